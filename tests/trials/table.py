"""The tables of trials: a row for each, written as soon as it is known."""

import csv
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

from tests.trials.study import ROOT

OK = "ok"


@dataclass(frozen=True)
class Row:
    """What came of one trial."""

    kind: str
    number: int
    target: str  # what was disturbed
    action: str  # and how
    verdict: str  # "ok", or what is wrong
    exit_code: int | str
    seconds: float
    peak_mb: float
    detail: str = ""  # of a verdict that is not "ok"
    seed: int = 0
    library: str = ""  # git's name of the tree that was tried


@dataclass(frozen=True)
class Kind:
    """Trials of one kind; each can be repeated alone by its number."""

    name: str
    count: int
    trial: Callable[[Path, int, int], Row]  # of a folder for work, a seed and a number


@dataclass(frozen=True)
class Table:
    """The rows of one kind in a file; those of another seed or library give way to new ones."""

    path: Path
    seed: int
    library: str

    def known(self) -> dict[int, Row]:
        """The rows of this seed and library, by number."""
        return {row.number: row for row in self._rows() if self._ours(row)}

    def begin(self, kept: dict[int, Row]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write([kept[number] for number in sorted(kept)])

    def add(self, row: Row) -> None:
        """Append it; the file is whole after each."""
        with self.path.open("a", newline="") as file:
            self._writer(file).writerow(asdict(row))

    def sort(self) -> None:
        """By number, once all are there."""
        self._write(sorted(self._rows(), key=lambda row: row.number))

    def _ours(self, row: Row) -> bool:
        return (row.seed, row.library) == (self.seed, self.library)

    def _rows(self) -> list[Row]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return [_typed(line) for line in csv.DictReader(file)]

    def _write(self, rows: list[Row]) -> None:
        with self.path.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    @staticmethod
    def _writer(file: TextIO) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, [spec.name for spec in fields(Row)], lineterminator="\n")


def printable(text: str, most: int = 200) -> str:
    """A text on one line of visible characters, and not too many."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= most else f"{shown[:most]}…"


def _typed(line: dict[str, str]) -> Row:
    numbers = {"number": int, "seconds": float, "peak_mb": float, "seed": int}
    return Row(**{key: numbers.get(key, str)(value) for key, value in line.items()})  # type: ignore[operator]


def library() -> str:
    """Git's name of the tree lyco_lab/; it ends in + if files there are not committed."""
    tree = _git("rev-parse", "--short=10", "HEAD:lyco_lab")
    return tree + "+" * bool(_git("status", "--porcelain", "lyco_lab"))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()
