"""The state of a run on disk: factors, their average, optimizer, and the number of steps done.

    train/checkpoints/step00000100.ckpt     the last two are kept, of a run that is done the last

The frozen model is not in it, nor a generator: those depend on the configuration and the step
alone. The file holds plain containers and is read with `weights_only=True`. It appears under its
name only when whole; one that was damaged later is noticed by its checksums, and the one before
it is used.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lyco_lab.files import atomic
from lyco_lab.record import Record

KEPT = 2
Factors = dict[str, dict[str, Tensor]]  # part -> 'layer.factor' -> value


@dataclass(frozen=True)
class State:
    """Everything that moves in a run, between two steps."""

    step: int  # done so far
    factors: Factors
    average: dict[str, Tensor] | None  # 'part.layer.factor' -> value
    optimizer: dict[str, Any]
    seconds: float  # of training, all sittings together
    threads: int  # another number adds up in another order
    nondeterministic: tuple[str, ...] = ()  # operations that it met without an exact algorithm
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)  # what they remember
    ended: bool = False  # a callback has stopped the run
    rows: str = ""  # the digest of metrics.csv up to this step; "" in files that have none


@dataclass(frozen=True)
class Checkpoints:
    folder: Path

    @classmethod
    def of(cls, record: Record) -> "Checkpoints":
        """Those of a run."""
        return cls(record.path / "train" / "checkpoints")

    def save(self, state: State) -> None:
        write(self.file(state.step), state)
        self.keep(KEPT)

    def keep(self, count: int) -> None:
        """Delete all but the newest."""
        for old in self.files()[count:]:
            old.unlink()

    def file(self, step: int) -> Path:
        return self.folder / f"step{step:08d}.ckpt"

    def files(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step*.ckpt"), reverse=True)

    def latest(self, rows: Sequence[str], say: Callable[[str], None] = print) -> State | None:
        """The newest whole state whose rows are in the journal as it left them; None: begin at 0.

        `rows`: the journal's `digests`. What has to be passed over is said, and deleted.
        """
        for file in self.files():
            state = read(file)
            if state is None:
                reason = "is damaged"
            elif state.step >= len(rows):
                reason = f"lacks its rows in metrics.csv ({len(rows) - 1})"
            elif state.rows not in ("", rows[state.step]):
                reason = "was saved beside other rows than metrics.csv has now"
            else:
                return state
            say(f"the checkpoint {file.name} {reason}: going on from the one before it")
            file.unlink()
        return None


def write(path: Path, state: State) -> None:
    # Not `asdict`, which would copy every tensor.
    plain = {spec.name: getattr(state, spec.name) for spec in fields(state)}
    with atomic(path) as temporary:
        torch.save(plain, temporary)


def read(path: Path) -> State | None:
    """None if the file is not whole."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            if archive.testzip() is not None:
                return None
        return State(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # whatever a reader makes of damaged bytes
        return None
