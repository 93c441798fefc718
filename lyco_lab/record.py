"""The run folder: what each stage leaves there, and whether it is done.

    runs/NAME-HASH/
        config.yaml         the whole configuration
        done/STAGE.json     written last by a stage: its facts, and size and digest of each output

Stages meet only in these files, so each can be killed at any moment and run again: whatever is
not yet complete is not yet visible under its final name. A stage without its mark is not done, and
neither is one whose mark is damaged: a mark carries a checksum of itself.

A stage reads the outputs of another only after `require` has compared them with their digests. A
mark also notes the content that its stage read, so a stage whose input was made anew and came out
otherwise is known to be stale (`settled`).

Folders of images that runs share (`base/`) have the same marks.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import yaml

from lyco_lab.errors import UserError
from lyco_lab.files import LOCK, PART, atomic, digest_of, sweep, writing
from lyco_lab.readers import Damaged, read_json, read_text

CONFIG = "config.yaml"
STAGES = ("data", "train", "generate", "evaluate")  # of a run, in order
# stage -> the outputs that later stages build on, and those that only people and tables read
CONTENT = {
    "data": ("data",),
    "train": ("adapter.safetensors", "embeddings"),
    "generate": ("generate",),
    "evaluate": ("evaluate",),
}
BESIDE_CONTENT = {"data": ("images.csv",), "train": ("train",)}
# Outputs that a finished run can do without: nothing is made again for their sake.
SPARE = ("train/checkpoints", "train/samples")
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
    return _digest(identity(config), 4)


def _digest(plain: Mapping[str, Any], size: int) -> str:
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


@dataclass(frozen=True)
class Output:
    """A file as its stage left it."""

    bytes: int
    blake2b: str  # 32 hex digits, as `files.digest_of` has them
    content: bool = True  # whether later stages build on it


@dataclass(frozen=True)
class Mark:
    """What done/STAGE.json holds."""

    facts: dict[str, Any]
    outputs: dict[str, Output]  # by path below the record's folder
    reads: dict[str, str] = field(default_factory=dict)  # stage -> the content that was read
    beside: tuple[str, ...] = ()  # stages of shared folders that have to be done as well

    @property
    def content(self) -> str:
        """A digest of all outputs that later stages build on."""
        built_on = {name: out.blake2b for name, out in self.outputs.items() if out.content}
        return _digest(built_on, 16)

    def write(self, path: Path) -> None:
        plain = asdict(self)
        with atomic(path) as temporary:
            text = json.dumps({"checksum": _digest(plain, 16), **plain}, indent=2, sort_keys=True)
            temporary.write_text(text + "\n")


@dataclass(frozen=True)
class Fault:
    """An output that is not there any more, or not as its stage left it."""

    stage: str
    name: str  # its path below the record's folder
    reason: str
    path: Path

    @property
    def spare(self) -> bool:
        return is_below(self.name, SPARE)

    def __str__(self) -> str:
        return f"{self.path} (of the stage {self.stage}) {self.reason}"


@dataclass(frozen=True)
class Record:
    """One run's folder, or a folder of images that runs share."""

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
            with atomic(path / CONFIG) as temporary:
                temporary.write_text(yaml.safe_dump(run.to_dict(), sort_keys=False))
        return cls(path)

    def done(self, stage: str) -> bool:
        """Whether the stage has a whole mark; `faults` says whether its outputs still stand."""
        return self._mark_or_none(stage) is not None

    def fresh(self, stage: str) -> bool:
        """Whether the stage is done, and what it read is what its inputs hold now."""
        mark = self._mark_or_none(stage)
        if mark is None:
            return False
        now = {name: self._other(name) for name in mark.reads}
        return all(other and other.content == mark.reads[name] for name, other in now.items())

    def settled(self, stage: str) -> bool:
        """Whether nothing is to do: the stage is fresh, and its share of other folders is done."""
        return self.fresh(stage) and all(map(self._other, self.mark(stage).beside))

    def pending(self, stage: str) -> bool:
        """Whether the stage has to be carried out. If it is stale, its old outputs are deleted."""
        if self.fresh(stage):
            return False
        if (mark := self._mark_or_none(stage)) is not None:
            self.undo(stage)
            for name in mark.outputs:
                (self.path / name).unlink(missing_ok=True)
        return True

    def finish(
        self,
        stage: str,
        *,
        outputs: Sequence[Path] | None = None,
        reads: Iterable[str] = (),
        beside: Iterable[str] = (),
        **facts: Any,
    ) -> None:
        """Declare `stage` done, with facts (plain JSON values) that later stages may read.

        `outputs`: the files that it leaves; those below its usual places if None. `reads`: stages
        of shared folders, as "base/NAME/generate", that it has read beside the earlier stages of
        its own run; `beside`: those that it takes care of without reading them.
        """
        earlier = [name for name in _before(stage) if self.done(name)]
        Mark(
            facts=facts,
            outputs=dict(self._outputs(stage, outputs)),
            reads={name: self.mark(name).content for name in earlier}
            | {name: _found(self._other(name), name).content for name in reads},
            beside=tuple(beside),
        ).write(self.mark_file(stage))

    def facts(self, stage: str) -> dict[str, Any]:
        return dict(self.mark(stage).facts)

    def require(self, stage: str) -> dict[str, Any]:
        """The facts of a stage whose outputs all stand as it left them; else `Damaged`."""
        facts = self.facts(stage)
        for fault in self.faults(stage):
            if not fault.spare:
                raise _damaged(fault)
        return facts

    def output(self, stage: str, name: str) -> Path:
        """One output of a stage that is done, after comparing it with its digest."""
        noted = self.mark(stage).outputs.get(name)
        if noted is None:
            raise Damaged(self.mark_file(stage), f"it lists no output {name}")
        if (reason := _fault_of(self.path / name, noted)) is not None:
            raise _damaged(Fault(stage, name, reason, self.path / name))
        return self.path / name

    def faults(self, stage: str) -> list[Fault]:
        """Outputs that are gone or changed, of a stage that is done."""
        mark = self._mark_or_none(stage)
        return [
            Fault(stage, name, reason, self.path / name)
            for name, noted in (mark.outputs.items() if mark else ())
            if (reason := _fault_of(self.path / name, noted)) is not None
        ]

    def undo(self, stage: str) -> None:
        """Declare a stage not done; its outputs stay."""
        self.mark_file(stage).unlink(missing_ok=True)

    def drop(self, stage: str, names: Iterable[str]) -> None:
        """Strike outputs off a stage's mark."""
        mark, gone = self.mark(stage), set(names)
        kept = {name: out for name, out in mark.outputs.items() if name not in gone}
        Mark(mark.facts, kept, mark.reads, mark.beside).write(self.mark_file(stage))

    def mark(self, stage: str) -> Mark:
        """The stage's mark; a `UserError` if it has none or a damaged one."""
        file = self.mark_file(stage)
        if not file.is_file():
            raise UserError(f"the stage {stage!r} of {self.path} is not done: run it first")
        try:
            return _read_mark(file)
        except Damaged as error:
            raise Damaged(file, f"{error.reason}; run the study again to mend it") from error

    def mark_file(self, stage: str) -> Path:
        return self.path / "done" / f"{stage}.json"

    def marked(self) -> list[str]:
        """The stages that have a mark, whole or not, in order."""
        found = [file.stem for file in sorted((self.path / "done").glob("*.json"))]
        return sorted(found, key=lambda stage: (*STAGES, stage).index(stage))

    def _mark_or_none(self, stage: str) -> Mark | None:
        file = self.mark_file(stage)
        try:
            return _read_mark(file) if file.is_file() else None
        except Damaged:
            return None

    def _other(self, name: str) -> Mark | None:
        """The mark of a stage of this record, or of a folder beside it ("base/NAME/STAGE")."""
        folder, _, stage = name.rpartition("/")
        record = Record(self.path.parent / folder) if folder else self
        return record._mark_or_none(stage)

    def _outputs(self, stage: str, given: Sequence[Path] | None) -> Iterator[tuple[str, Output]]:
        places = (*CONTENT.get(stage, ()), *BESIDE_CONTENT.get(stage, ()))
        files = files_below(self.path, places) if given is None else given
        for file in files:
            name = file.relative_to(self.path).as_posix()
            yield (
                name,
                Output(
                    bytes=file.stat().st_size,
                    blake2b=digest_of(file),
                    content=not is_below(name, BESIDE_CONTENT.get(stage, ())),
                ),
            )


def files_below(folder: Path, places: Iterable[str]) -> list[Path]:
    """All files at or below these places of a folder, but for half-written ones; sorted."""
    found: list[Path] = []
    for place in (folder / name for name in places):
        inside = place.rglob("*") if place.is_dir() else [place]
        found += [file for file in inside if file.is_file()]
    return sorted(file for file in found if not any(p.startswith(PART) for p in file.parts))


def is_below(name: str, places: Iterable[str]) -> bool:
    """Whether a path is one of these places or lies below it."""
    path = PurePosixPath(name)
    return any(path.is_relative_to(place) for place in places)


def _before(stage: str) -> tuple[str, ...]:
    return STAGES[: STAGES.index(stage)] if stage in STAGES else ()


def _found(mark: Mark | None, name: str) -> Mark:
    if mark is None:
        raise UserError(f"{name} is not done: run it first")
    return mark


def _damaged(fault: Fault) -> Damaged:
    return Damaged(
        fault.path,
        f"it {fault.reason} since the stage {fault.stage!r} left it; run the study again, which "
        "makes anew what is damaged and nothing else",
    )


def _fault_of(path: Path, noted: Output) -> str | None:
    """What is wrong with an output, as in "has changed"; None if nothing is."""
    try:
        stat = path.stat()
    except OSError:
        return "is gone"
    if stat.st_size != noted.bytes or not path.is_file():
        return "has changed"
    signature = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return None if _digest_once(path, signature) == noted.blake2b else "has changed"


@lru_cache(maxsize=2**16)
def _digest_once(path: Path, _signature: tuple[int, ...]) -> str:
    """A process hashes a file once while nobody writes to it."""
    return digest_of(path)


def _read_mark(file: Path) -> Mark:
    stat = file.stat()
    return _read_mark_once(file, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@lru_cache(maxsize=4096)
def _read_mark_once(file: Path, _signature: tuple[int, ...]) -> Mark:
    plain = read_json(file)
    if "checksum" not in plain:
        raise Damaged(
            file,
            "it lists no digests of outputs, as those of earlier versions; if the run is whole, "
            "lyco-lab check --adopt notes them as they are now",
        )
    if plain.pop("checksum") != _digest(plain, 16):
        raise Damaged(file, "its checksum is not that of its content")
    plain["outputs"] = {name: Output(**each) for name, each in plain["outputs"].items()}
    return Mark(**plain | {"beside": tuple(plain["beside"])})


def _check_same_configuration(path: Path, run: Configured) -> None:
    """Whether the folder is this run's, by its config.yaml.

    The folder's name ends with the digest of its configuration, so a file that has another digest
    is damaged. It decides nothing, and is written anew.
    """
    file = path / CONFIG
    if not file.exists() and not (path / "done").is_dir():
        # A kill between creating the folder and its first file leaves only temporary ones.
        if all(c.name == LOCK or c.name.startswith(PART) for c in path.iterdir()):
            return
        raise UserError(f"{path} holds other files and no {CONFIG}: it is not a run")
    found = read_config(path)
    if found is None:
        if not (path / "done").is_dir():
            raise UserError(
                f"{file} cannot be read; delete the folder or write elsewhere with --out"
            )
        print(f"{file} was damaged, and is written anew")
        return
    theirs, ours = _flat(identity(found)), _flat(identity(run.to_dict()))
    for key in sorted(ours.keys() | theirs.keys()):
        there, here = (repr(c[key]) if key in c else "missing" for c in (theirs, ours))
        if there != here:
            raise UserError(
                f"{path} was made by another configuration: there {key} is {there}, here {here}; "
                "delete the folder or write elsewhere with --out"
            )


def read_config(path: Path) -> dict[str, Any] | None:
    """The configuration in a run's folder; None if it is not what the folder is named by."""
    try:
        found = yaml.safe_load(read_text(path / CONFIG))
    except (yaml.YAMLError, UserError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    found = {str(key): value for key, value in found.items()}
    try:
        return found if path.name.endswith(f"-{digest(found)}") else None
    except (TypeError, ValueError, AttributeError):  # keys of several types, no mapping of settings
        return None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}, so that two configurations can be compared key by key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
