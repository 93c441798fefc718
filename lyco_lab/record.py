"""The run folder: what each stage leaves there, and whether it is done.

    runs/NAME-HASH/
        config.yaml         the whole configuration
        done/STAGE.json     written last by a stage: its facts; a stage without it is not done

Stages meet only in these files, so each can be killed at any moment and run again: whatever is
not yet complete is not yet visible under its final name.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from lyco_lab.errors import UserError

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
FULL = {errno.ENOSPC, errno.EDQUOT}
LEAST_FREE_BYTES = 2**20  # writers that do not raise OSError are judged by the space left
STAGES = ("data", "train", "generate", "evaluate")  # of a run, in order
LOCK = ".lock"  # held, in a run's folder, by the process that works on it
# What a run is called, what it runs on and where it is shown: not its result, but for callbacks.
LABELS = ("name", "study", "trainer", "wandb")


class Configured(Protocol):
    """What a folder needs to know of a run; `lyco_lab.config.Run` is one."""

    @property
    def folder_name(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that decides its result."""
    kept = {key: value for key, value in config.items() if key not in LABELS}
    callbacks = config.get("trainer", {}).get("callbacks")  # which may do whatever they like
    return kept | {"trainer": {"callbacks": callbacks}} if callbacks else kept


def digest(config: Mapping[str, Any]) -> str:
    """Eight hex digits of everything in a configuration that decides the result."""
    text = json.dumps(identity(config), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


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
        temporary = Path(tempfile.mkdtemp(prefix=".part-", dir=path.parent))
        try:
            yield temporary / path.name
            if durable:
                with open(temporary / path.name, "rb") as written:
                    os.fsync(written.fileno())
            os.replace(temporary / path.name, path)
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
        if number in FULL or _nearly_full(folder):
            raise UserError(
                f"no space left to write in {folder}: free some and run the same command again"
            ) from error
        if number in UNWRITABLE:
            reason = os.strerror(number).lower() if number else str(error)
            raise UserError(f"cannot write in {folder}: {reason}; choose another folder") from error
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process works on `folder`, and keep others waiting meanwhile.

    The lock dies with the process that holds it, however it ends.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")  # noqa: SIM115 - closed below, past `writing`
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _nearly_full(folder: Path) -> bool:
    existing = next((p for p in (folder, *folder.parents) if p.is_dir()), Path("/"))
    return shutil.disk_usage(existing).free < LEAST_FREE_BYTES


@dataclass(frozen=True)
class Record:
    """One run's folder."""

    path: Path

    @classmethod
    def open(cls, root: Path, run: Configured) -> "Record":
        """Create `root/run.folder_name`, or reopen it; what it holds must be this run's."""
        path = Path(root) / run.folder_name
        with writing(path):
            if path.is_dir() and any(path.iterdir()):
                _check_same_configuration(path, run)
                _sweep(path)
            else:
                path.mkdir(parents=True, exist_ok=True)
            with atomic(path / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(run.to_dict(), sort_keys=False))
        return cls(path)

    def done(self, stage: str) -> bool:
        return self._mark(stage).is_file()

    def finish(self, stage: str, **facts: Any) -> None:
        """Declare `stage` done, with facts (plain JSON values) that later stages may read."""
        with atomic(self._mark(stage)) as temporary:
            temporary.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")

    def facts(self, stage: str) -> dict[str, Any]:
        if not self.done(stage):
            raise UserError(f"the stage {stage!r} of {self.path} is not done: run it first")
        facts: dict[str, Any] = json.loads(self._mark(stage).read_text())
        return facts

    def _mark(self, stage: str) -> Path:
        return self.path / "done" / f"{stage}.json"


def _sweep(path: Path) -> None:
    """Remove what a kill left half-written, unless another process is writing here right now."""
    with open(path / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for stale in path.rglob(".part-*"):
            shutil.rmtree(stale, ignore_errors=True)


def _check_same_configuration(path: Path, run: Configured) -> None:
    file = path / "config.yaml"
    if not file.is_file():
        # A kill between creating the folder and its first file leaves only temporary ones.
        if all(c.name == LOCK or c.name.startswith(".part-") for c in path.iterdir()):
            return
        raise UserError(f"{path} holds other files and no config.yaml: it is not a run")
    try:
        found = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        found = None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{file} cannot be read; delete the folder or write elsewhere with --out")
    theirs = _flat(identity({str(key): value for key, value in found.items()}))
    ours = _flat(identity(run.to_dict()))
    for key in sorted(ours.keys() | theirs.keys()):
        there, here = (repr(c[key]) if key in c else "missing" for c in (theirs, ours))
        if there != here:
            raise UserError(
                f"{path} was made by another configuration: there {key} is {there}, here {here}; "
                "delete the folder or write elsewhere with --out"
            )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}, so that two configurations can be compared key by key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
