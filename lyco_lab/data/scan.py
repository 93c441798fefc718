"""All files below a folder, each with a stamp that changes when the file does.

A stamp is (size, modified, changed): what it says of a file can be trusted for as long as the file
has the same one. Only the kernel sets the time of change, so an edit that puts the size and the
time of modification back is seen too. A file changed less than `SETTLED_NS` before it was looked at
may change again within one tick of the clock: its stamp is `UNSETTLED` and matches nothing.
"""

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SETTLED_NS = 2_000_000_000  # the coarsest clocks of file systems tick once in two seconds
UNSETTLED = 0
PSEUDO = ("/proc", "/sys", "/dev")  # what the kernel shows as files, without end or contents
DISK = "/dev/shm"


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


def pseudo(folder: Path) -> bool:
    """Whether a folder, or what it is a link to, is the kernel's and on no disk."""
    real = os.path.realpath(folder)
    inside = [place for place in (*PSEUDO, DISK) if f"{real}/".startswith(f"{place}/")]
    return bool(inside) and DISK not in inside


def walk(root: Path, lost: list[Lost], *, recursive: bool = True) -> Iterator[Folder]:
    """The folders from `root` down in the order of their names; what is not entered is lost.

    Links are followed, but neither to a folder above the root, which would be another question, nor
    to what the kernel only shows as files.
    """
    now = time.time_ns()
    seen: dict[tuple[int, int], str] = {}
    above = {(s.st_dev, s.st_ino) for s in map(os.stat, Path(os.path.realpath(root)).parents)}
    waiting = [""]
    while waiting:
        path = waiting.pop()
        where = root / path
        try:
            status = where.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                other = seen[identity] or "the folder of images itself"
                lost.append(Lost(path, f"folder read already: it is {other}"))
                continue
            if identity in above:
                lost.append(Lost(path, "link to a folder above the folder of images"))
                continue
            if path and where.is_symlink() and pseudo(where):
                lost.append(Lost(path, "link to what is on no disk"))
                continue
            with os.scandir(where) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            lost.append(Lost(path, f"folder {_unreadable(error)}"))
            continue
        seen[identity] = path
        folder, below = _sorted(path, inside, lost, now, recursive=recursive)
        yield folder
        waiting += reversed(below)


def _sorted(
    path: str, inside: Iterable["os.DirEntry[str]"], lost: list[Lost], now: int, *, recursive: bool
) -> tuple[Folder, list[str]]:
    """A folder with its files, and the folders in it that are to be entered."""
    folder, below = Folder(path), []
    for entry in inside:
        name = folder.name(entry.name)
        if not _is_text(entry.name):
            lost.append(Lost(name, "name not UTF-8: rename it"))
            continue
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
        elif not stat.S_ISREG(status.st_mode):
            lost.append(Lost(name, "no regular file: a pipe, a socket or a device"))
        else:
            settled = now - status.st_ctime_ns > SETTLED_NS
            changed_ns = status.st_ctime_ns if settled else UNSETTLED
            folder.files[entry.name] = Stamp(status.st_size, status.st_mtime_ns, changed_ns)
    return folder, below


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unreadable(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "link in a circle"
    if error.errno == errno.ENOENT:
        return "broken link"
    return f"not readable: {os.strerror(error.errno or 0).lower()}"
