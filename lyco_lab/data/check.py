"""Every image decoded once, before anything is trained on it, and a digest of its bytes noted.

A header says little of what follows it: a file may end in the middle of its pixels. Only files that
are new or changed since the last time are read; the memo knows the others by their stamps.
"""

import hashlib
import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lyco_lab.data import headers
from lyco_lab.data.headers import Unusable
from lyco_lab.data.index import SAVE_EVERY_S, Index, chunks
from lyco_lab.data.memo import Known, Memo
from lyco_lab.data.room import ROOM
from lyco_lab.data.scan import SETTLED_NS, UNSETTLED, Stamp
from lyco_lab.progress import Bar
from lyco_lab.workers import cores

DIGEST_BYTES = 16
AT_ONCE = 256  # files that the threads are given together


def stamp(path: Path) -> Stamp:
    status = path.stat()
    settled = time.time_ns() - status.st_ctime_ns > SETTLED_NS
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns if settled else UNSETTLED)


def decode(path: Path) -> bytes:
    """The digest of a file whose pixels can all be read."""
    try:
        with path.open("rb") as file:
            data = file.read(headers.MAX_BYTES + 1)
        if len(data) > headers.MAX_BYTES:
            raise Unusable(f"file too large: more than {headers.MAX_BYTES:,} bytes")
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG":  # an eighth of the size: all of the file is parsed
                image.draft(image.mode, (image.width // 8, image.height // 8))
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise Unusable(f"damaged: {' '.join(str(error).split())}") from None
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


@dataclass
class _Look:
    """A file that is to be decoded, and what came of it."""

    file: str
    stamp: Stamp
    known: Known


def check(index: Index, memo: Memo) -> tuple[Index, list[bytes], NDArray[np.int64]]:
    """The images whose pixels can be read, their digests, and their old places.

    An image's digest is one of its mask too, where it has one.
    """
    known = {
        file: Known(digest=digest)
        for file, digest in zip(index.files(), index.digests.to_pylist(), strict=True)
    }
    files = [[file] for file in index.files()]
    for i, mask in enumerate(index.texts["mask"].to_pylist()):
        if mask:
            files[i].append(str(index.sources[index.source_N[i]].folder / mask))
            known.setdefault(files[i][1], Known())
    todo: list[_Look] = []
    for file in [file for file, found in known.items() if not found.digest]:
        try:
            now = stamp(Path(file))
        except OSError as error:
            known[file] = Known(problem=f"gone: {os.strerror(error.errno or 0).lower()}")
            continue
        if not Path(file).is_file():  # a pipe would be waited for without end
            known[file] = Known(problem="no regular file: a folder, a pipe or a device")
            continue
        found = known[file] = memo.find(file, now) or Known()
        if not (found.digest or found.problem):
            todo.append(_Look(file, now, found))
    for look in _decoded(todo, memo):
        known[look.file] = look.known
    memo.save()
    reasons: dict[int, str] = {}
    digests: list[bytes] = []
    for i, both in enumerate(files):
        problems = [known[file].problem for file in both if known[file].problem]
        if problems:
            reasons[i] = problems[0] if known[both[0]].problem else f"mask {problems[0]}"
        elif len(both) == 2 and (why := _other_size(index, i, known[both[1]])):
            reasons[i] = why
        elif len(both) == 1:
            digests.append(known[both[0]].digest)
        else:
            joined = b"".join(known[file].digest for file in both)
            digests.append(hashlib.blake2b(joined, digest_size=DIGEST_BYTES).digest())
    kept = np.setdiff1d(np.arange(len(files)), np.fromiter(reasons, np.int64, len(reasons)))
    return (index.drop(reasons) if reasons else index), digests, kept


def _other_size(index: Index, i: int, mask: Known) -> str:
    """Why a mask does not lie over its image; "" if it does."""
    size, needed = (mask.width, mask.height), (int(index.width_N[i]), int(index.height_N[i]))
    if size == needed:
        return ""
    return (
        f"mask of another size: {index.text('mask', i)} is {size[0]} x {size[1]} pixels, needs "
        f"{needed[0]} x {needed[1]}"
    )


def _decoded(todo: list[_Look], memo: Memo) -> Iterator[_Look]:
    """The files, each with its digest or its problem, which the memo learns."""

    def look(task: _Look) -> Known:
        try:
            # An image that is new to the memo is one that changed since its header was read.
            header = (task.known.width, task.known.height)
            width, height = header if header != (0, 0) else headers.header(Path(task.file))
            with ROOM.of(width * height):
                return Known(width, height, digest=decode(Path(task.file)))
        except Unusable as reason:
            return task.known._replace(problem=str(reason))

    if not todo:
        return
    saved_s = time.monotonic()
    # Decoding leaves Python's lock, so threads share the work.
    with (
        headers.strict(),
        ThreadPoolExecutor(cores()) as pool,
        Bar("images checked", len(todo)) as bar,
    ):
        for rows in chunks(len(todo), AT_ONCE):
            tasks = [todo[row] for row in rows]
            for task, known in zip(tasks, pool.map(look, tasks), strict=True):
                memo.learn(task.file, task.stamp, known)
                yield _Look(task.file, task.stamp, known)
                bar.advance()
            if time.monotonic() - saved_s > SAVE_EVERY_S:
                memo.save()
                saved_s = time.monotonic()
