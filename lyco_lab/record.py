"""The run folder: what each stage leaves there, and whether it is done.

    runs/NAME-HASH/
        config.yaml         the whole configuration
        done/STAGE.json     written last by a stage: its facts; a stage without it is not done

Stages meet only in these files, so each can be killed at any moment and run again: whatever is
not yet complete is not yet visible under its final name.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from lyco_lab.errors import UserError
from lyco_lab.files import LOCK, PART, atomic, sweep, writing

STAGES = ("data", "train", "generate", "evaluate")  # of a run, in order
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
                sweep(path)
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


def _check_same_configuration(path: Path, run: Configured) -> None:
    file = path / "config.yaml"
    if not file.is_file():
        # A kill between creating the folder and its first file leaves only temporary ones.
        if all(c.name == LOCK or c.name.startswith(PART) for c in path.iterdir()):
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
