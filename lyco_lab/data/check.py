"""Every image decoded once, before anything is trained on it, and a digest of its bytes noted.

A header says little of what follows it: a file may end in the middle of its pixels. Only files that
are new or changed since the last time are read; the memo knows the others by their stamps.
"""

import hashlib
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lyco_lab.data.headers import Unusable, strict
from lyco_lab.data.index import SAVE_EVERY_S, Index, chunks
from lyco_lab.data.memo import Known, Memo
from lyco_lab.data.scan import SETTLED_NS, UNSETTLED, Stamp
from lyco_lab.errors import UserError
from lyco_lab.progress import Bar

DIGEST_BYTES = 16
AT_ONCE = 256  # files that the threads are given together


def stamp(path: Path) -> Stamp:
    status = path.stat()
    settled = time.time_ns() - status.st_ctime_ns > SETTLED_NS
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns if settled else UNSETTLED)


def decode(path: Path) -> bytes:
    """The digest of a file whose pixels can all be read."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG":  # an eighth of the size: all of the file is parsed
                image.draft(image.mode, (image.width // 8, image.height // 8))
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise Unusable(f"damaged: {' '.join(str(error).split())}") from None
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def mask_digest(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=DIGEST_BYTES).digest()
    except OSError as error:
        raise UserError(f"cannot read the mask {path}: {error.strerror}") from error


def check(index: Index, memo: Memo) -> tuple[Index, list[bytes], NDArray[np.int64]]:
    """The images whose pixels can be read, their files' digests, and their old places."""
    digests: dict[int, bytes] = {}
    reasons: dict[int, str] = {}
    todo: list[tuple[int, str, Stamp, Known]] = []
    for i in range(len(index)):
        file = str(index.file(i))
        try:
            now = stamp(Path(file))
        except OSError as error:
            reasons[i] = f"gone: {os.strerror(error.errno or 0).lower()}"
            continue
        known = memo.find(file, now) or Known(int(index.width_N[i]), int(index.height_N[i]))
        if known.digest:
            digests[i] = known.digest
        else:
            todo.append((i, file, now, known))

    def look(task: tuple[int, str, Stamp, Known]) -> bytes | str:
        try:
            return decode(Path(task[1]))
        except Unusable as reason:
            return str(reason)

    saved_s = time.monotonic()
    if todo:
        # Decoding leaves Python's lock, so threads share the work.
        with (
            strict(),
            ThreadPoolExecutor(os.cpu_count()) as pool,
            Bar("images checked", len(todo)) as bar,
        ):
            for rows in chunks(len(todo), AT_ONCE):
                tasks = [todo[row] for row in rows]
                for (i, file, now, known), found in zip(tasks, pool.map(look, tasks), strict=True):
                    if isinstance(found, str):
                        reasons[i] = found
                        known = known._replace(problem=found)
                    else:
                        digests[i] = found
                        known = known._replace(digest=found)
                    memo.learn(file, now, known)
                    bar.advance()
                if time.monotonic() - saved_s > SAVE_EVERY_S:
                    memo.save()
                    saved_s = time.monotonic()
    memo.save()
    kept = np.array(sorted(digests), np.int64)
    left = index.drop(reasons) if reasons else index
    return left, [digests[i] for i in kept.tolist()], kept
