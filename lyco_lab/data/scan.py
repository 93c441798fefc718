"""All files below a folder, each with a stamp that changes when the file does.

A stamp is (size, modified, changed): what it says of a file can be trusted for as long as the file
has the same one. Only the kernel sets the time of change, so an edit that puts the size and the
time of modification back is seen too. A file changed less than `SETTLED_NS` before it was looked at
may change again within one tick of the clock: its stamp is `UNSETTLED` and matches nothing.
"""

import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SETTLED_NS = 2_000_000_000  # the coarsest clocks of file systems tick once in two seconds
UNSETTLED = 0


class Stamp(NamedTuple):
    size: int
    modified_ns: int
    changed_ns: int


@dataclass(frozen=True)
class Folder:
    """One folder: its path relative to the root ("" for the root), and its files by name."""

    path: str
    files: dict[str, Stamp] = field(default_factory=dict)

    def name(self, file: str) -> str:
        """Relative to the root."""
        return f"{self.path}/{file}" if self.path else file


class Lost(NamedTuple):
    """What lies there and cannot be used."""

    path: str
    reason: str


def walk(root: Path, lost: list[Lost], *, recursive: bool = True) -> Iterator[Folder]:
    """The folders from `root` down in the order of their names; what is not entered is lost."""
    now = time.time_ns()
    seen: dict[tuple[int, int], str] = {}

    def enter(path: str) -> Iterator[Folder]:
        where = root / path
        try:
            status = where.stat()
            inside = sorted(os.scandir(where), key=lambda entry: entry.name)
        except OSError as error:
            lost.append(Lost(path, _unreadable(error)))
            return
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            other = seen[identity] or "the folder of images itself"
            lost.append(Lost(path, f"folder read already: it is {other}"))
            return
        seen[identity] = path
        folder, below = Folder(path), []
        for entry in inside:
            name = folder.name(entry.name)
            try:
                if entry.is_dir():
                    if entry.name.startswith("."):
                        lost.append(Lost(name, "hidden folder"))
                    elif recursive:
                        below.append(name)
                    else:
                        lost.append(Lost(name, "sub-folder: this source has none"))
                    continue
                status = entry.stat()
            except OSError as error:
                lost.append(Lost(name, _unreadable(error)))
                continue
            if entry.name.startswith("."):
                lost.append(Lost(name, "hidden file"))
                continue
            settled = now - status.st_ctime_ns > SETTLED_NS
            changed_ns = status.st_ctime_ns if settled else UNSETTLED
            folder.files[entry.name] = Stamp(status.st_size, status.st_mtime_ns, changed_ns)
        yield folder
        for name in below:
            yield from enter(name)

    yield from enter("")


def _unreadable(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "link in a circle"
    if error.errno == errno.ENOENT:
        return "broken link"
    return f"not readable: {os.strerror(error.errno or 0).lower()}"
