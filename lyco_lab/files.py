"""Writing files so that a kill loses nothing, and telling one content from another.

A file appears under its final name only when it is whole (`atomic`). One process at a time works on
a folder (`locked`). What a kill left half-written is removed later (`sweep`). `lyco_lab.readers`
reads.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from lyco_lab.errors import UserError

log = logging.getLogger(__name__)
UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EISDIR,
    errno.EIO,
}
FULL = {errno.ENOSPC, errno.EDQUOT}
LEAST_FREE_BYTES = 2**20  # writers that do not raise OSError are judged by the space left
SILENT_S = 1.0  # of waiting
LOCK = ".lock"  # held, in a folder, by the process that works on it
PART = ".part-"  # the beginning of the names of temporary folders
DIGEST_BYTES = 16
SEAL = b"\nblake2b "  # what a sealed file's last line begins with
SEAL_BYTES = len(SEAL) + 2 * DIGEST_BYTES + 1


@contextlib.contextmanager
def atomic(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write to; on success it becomes `path`, on error it is deleted.

    `durable` waits until the disk has it, against a power cut. Images by the hundred do without:
    that costs more than drawing them, and they can be drawn again.

    It keeps the file's own name, in a folder of its own beside it, so writers that look at the
    suffix are content and a half-written file is never caught by a listing of finished ones.
    """
    path = Path(path)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"cannot write the file {path}: a folder of that name is in the way")
        temporary = Path(tempfile.mkdtemp(prefix=PART, dir=path.parent))
        try:
            yield temporary / path.name
            if durable:
                with open(temporary / path.name, "rb") as written:
                    os.fsync(written.fileno())
            os.replace(temporary / path.name, path)
            log.debug("wrote %s", path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn 'disk full' and 'not allowed' inside the block into a `UserError` naming `folder`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL or (number is None and _nearly_full(folder)):
            raise UserError(
                f"no space left to write in {folder}: free some and run the same command again"
            ) from error
        if number in UNWRITABLE or (number == errno.ENOENT and _not_to_be_made(folder, error)):
            reason = os.strerror(number).lower() if number else str(error)
            raise UserError(f"cannot write in {folder}: {reason}; choose another folder") from error
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process works on `folder`, and keep others waiting meanwhile.

    The lock dies with the process that holds it, however it ends. Whom one waits for is said after
    a second.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _open_lock(folder)
    with lock:
        _wait_for(lock, folder)
        _sign(lock)
        yield


def owner(folder: Path) -> str:
    """'process 123 on HOST since TIME' of the process that works on `folder`; '' if none does."""
    with contextlib.suppress(OSError), open(folder / LOCK, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _named(lock)
    return ""


def _wait_for(lock: IO[bytes], folder: Path) -> None:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return

    def say() -> None:
        print(f"waiting for {folder}, which is in use by {_named(lock)}", flush=True)

    timer = threading.Timer(SILENT_S, say)
    timer.daemon = True
    timer.start()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        timer.cancel()


def _sign(lock: IO[bytes]) -> None:
    """Say in the lock who holds it."""
    if os.fstat(lock.fileno()).st_nlink > 1:
        return  # another name of the file may be someone's data
    since = datetime.now().isoformat(sep=" ", timespec="seconds")
    text = f"process {os.getpid()} on {platform.node()} since {since}\n".encode()
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(lock.fileno(), 0)
        os.pwrite(lock.fileno(), text, 0)


def _named(lock: IO[bytes]) -> str:
    text = os.pread(lock.fileno(), 200, 0).decode(errors="replace").strip()
    return text if text.startswith("process ") and text.isprintable() else "another process"


def sweep(folder: Path) -> None:
    """Remove what kills left half-written below `folder`, unless a process works on it now."""
    if not folder.is_dir():
        return
    with writing(folder):
        lock = _open_lock(folder)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for stale in folder.rglob(f"{PART}*"):
            shutil.rmtree(stale, ignore_errors=True)


def cell(value: object) -> object:
    """A value as it may stand in a CSV file: text that a spreadsheet would compute is quoted.

    =1+1 becomes '=1+1, as do texts that begin with +, -, @ and blanks before them; a number stays.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("=", "+", "-", "@")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def digest_of(path: Path) -> str:
    """The file's bytes as 32 hex digits of BLAKE2b, whatever its size in constant memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)
        ).hexdigest()


def seal(path: Path) -> None:
    """Append the digest of the file's bytes to it, which `readers.read_sealed` checks."""
    line = SEAL + digest_of(path).encode() + b"\n"
    with open(path, "ab") as file:
        file.write(line)


def _open_lock(folder: Path) -> IO[bytes]:
    """The lock file, created if need be; never truncated, and no link to another file."""
    path = folder / LOCK
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(
            f"{path} is a link, and a lock has to be a file of its own: delete the link"
        ) from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise UserError(f"{path} is no regular file, so it cannot be a lock: delete it")
    return os.fdopen(number, "r+b")


def _nearly_full(folder: Path) -> bool:
    existing = next((p for p in (folder, *folder.parents) if p.is_dir()), Path("/"))
    usage = shutil.disk_usage(existing)
    return usage.total > 0 and usage.free < LEAST_FREE_BYTES  # /proc has no size


def _not_to_be_made(folder: Path, error: Exception) -> bool:
    """Whether it is `folder`, or one above it, that could not be made, as in /proc."""
    name = getattr(error, "filename", None)
    return name is not None and Path(name) in (folder, *folder.parents) and not folder.exists()
