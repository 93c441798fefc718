"""train/metrics.csv: one row for each step, readable while the run goes on.

    step,loss,lr,lr_text_encoder,grad_norm,delta_norm,validation_loss

`step` counts finished steps from 1; loss and gradient norm are before the step's update. After it
are `delta_norm`, the Frobenius norm of W' - W over all adapted layers together, and the loss on
images that are not trained on; both are empty in most rows. Floats are written by `repr`, so not a
bit of them is lost.
"""

import csv
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from lyco_lab.files import atomic, writing

COLUMNS = (
    "step", "loss", "lr", "lr_text_encoder", "grad_norm", "delta_norm", "validation_loss",
)  # fmt: skip


Row = Mapping[str, float | None]  # a value may be missing, or None


class Journal:
    """The file, open for appending; rows after `step`, which are to be computed again, are gone."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = rows(path, step)
        write(path, kept)
        self._digest = hashlib.blake2b(digest_size=16)
        for row in kept:
            self._digest.update(_hashed(_cells(row)))
        with writing(path.parent):
            self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def write(self, row: Row) -> None:
        """Visible at once: a killed process loses no row."""
        with writing(self.path.parent):
            self._writer.writerow(_cells(row))
            self._file.flush()
        self._digest.update(_hashed(_cells(row)))

    @property
    def digest(self) -> str:
        """Of all rows so far; what `digests` finds in the file."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Onto the disk itself, before a checkpoint relies on it."""
        with writing(self.path.parent):
            os.fsync(self._file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def rows(path: Path, step: int) -> list[dict[str, float | None]]:
    """The rows of steps 1 to `step`, all of which have to be there."""
    found = _rows_up_to(path, step)
    if len(found) != step:
        raise ValueError(f"{path} has {len(found)} whole rows up to step {step}")
    return [
        {key: float(cell) if cell else None for key, cell in zip(COLUMNS, row, strict=True)}
        | {"step": int(row[0])}
        for row in found
    ]


def write(path: Path, rows: Iterable[Row]) -> None:
    """The file with these rows, in place of what it was."""
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(map(_cells, rows))


def column(path: Path, name: str, step: int) -> dict[int, float]:
    """{step: value} up to `step`, where there is one."""
    at = COLUMNS.index(name)
    return {int(row[0]): float(row[at]) for row in _rows_up_to(path, step) if row[at]}


def digests(path: Path) -> list[str]:
    """The digest of the first 0, 1, 2, … whole rows, counted from step 1 without a gap."""
    digest = hashlib.blake2b(digest_size=16)
    found = [digest.hexdigest()]
    for row in _rows_up_to(path, None):
        digest.update(_hashed(row))
        found.append(digest.hexdigest())
    return found


def _hashed(cells: list[str]) -> bytes:
    return (",".join(cells) + "\n").encode()


def _cells(row: Row) -> list[str]:
    values = (row.get(column) for column in COLUMNS)
    return ["" if value is None else repr(value) for value in values]


def _rows_up_to(path: Path, step: int | None) -> list[list[str]]:
    """The rows of steps 1, 2, … `step`, up to one that a kill cut short or that is damaged."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    rows: list[list[str]] = []
    for line in lines[1:]:
        row = line.rstrip("\r\n").split(",")
        whole = len(row) == len(COLUMNS) and row[0] == str(len(rows) + 1)
        whole = whole and all(map(_is_number_or_empty, row))
        if not whole or (step is not None and len(rows) == step):
            break
        rows.append(row)
    return rows


def _is_number_or_empty(cell: str) -> bool:
    try:
        return not cell or float(cell) is not None
    except ValueError:
        return False
