"""Verdicts as people and programs read them."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lyco_lab.files import atomic
from lyco_lab.verify.case import Case, as_power
from lyco_lab.verify.verdict import ALLOWED, DIFFERENT, EQUAL, NONE, ROUNDED, UNTOLD, Verdict


@dataclass(frozen=True)
class Row:
    """A case that was tried. Its fields are the columns of the CSV and the keys of the JSON."""

    case: str
    adapter: str
    optimizer: str
    dtype: str
    gamma: float
    s: str  # every s that occurs
    carry: str
    keep: str
    claim: str  # EQUAL, EQUAL to rounding, DIFFERENT; "" for none
    verdict: str
    holds: bool  # what is claimed was seen, and is not denied
    steps: int
    layers: int
    delta_error: float
    loss_error: float
    rounding: float | None  # the error of W' - W that rounding alone makes
    first_step: int | None
    first_place: str
    why: str
    seconds: float

    @classmethod
    def of(cls, case: Case, verdict: Verdict, found: str, seconds: float) -> "Row":
        claim = case.claim
        word = ""
        if case.predicted:
            word = DIFFERENT
        elif claim is not None:
            word = EQUAL if claim.bitwise or (case.in_bits and not case.keep) else ROUNDED
        why = case.denied or found or case.no_claim
        if not why and case.predicted and claim is not None:
            why = f"{case.keep} is as in R, so {claim.reason}"
        # A claim of equality to rounding is met by equal bits, too.
        met = {"": True, DIFFERENT: verdict.word == DIFFERENT, EQUAL: verdict.word == EQUAL,
               ROUNDED: verdict.word in (EQUAL, ROUNDED)}[word]  # fmt: skip
        return cls(
            case=case.name,
            adapter=case.adapter,
            optimizer=case.optimizer,
            dtype=case.base.model.precision,
            gamma=case.gamma,
            s=" ".join(as_power(s) for s in case.scales),
            carry=case.carry,
            keep=case.keep or "",
            claim=word,
            verdict=verdict.word,
            holds=verdict.word != NONE and met and not case.denied,
            steps=verdict.steps,
            layers=verdict.layers,
            delta_error=verdict.delta_error,
            loss_error=verdict.loss_error,
            rounding=verdict.rounding,
            first_step=verdict.first_step,
            first_place=verdict.first_place,
            why=why,
            seconds=round(seconds, 2),
        )

    @property
    def line(self) -> str:
        """The case in a line."""
        return f"{self.case}: {self._said()}"

    def _said(self) -> str:
        if self.verdict == NONE:
            return f"{NONE}: {self.why}"
        prefix = "" if self.claim else f"no claim: {self.why}; trained all the same: "
        where = f"{self.steps} steps, {self.layers} layers"
        if self.verdict == UNTOLD:
            expected = "a difference is predicted" if self.claim == DIFFERENT else "equal"
            said = f"{UNTOLD} ({expected}, {where}, to {self.delta_error:.1g} at the end)"
        elif self.verdict == EQUAL:
            said = f"EQUAL (bitwise, {where})"
        elif self.verdict == ROUNDED:
            said = (
                f"EQUAL to {self.delta_error:.1g} (loss {self.loss_error:.1g}, {where}; rounding "
                f"alone makes {self.rounding:.1g}, up to {ALLOWED:g} times that is let pass)"
            )
        else:
            predicted = " as predicted" if self.claim == DIFFERENT else ""
            said = (
                f"DIFFERENT{predicted} from step {self.first_step}, first in {self.first_place} "
                f"(to {self.delta_error:.1g} at the end)"
            )
        if self.verdict == DIFFERENT and self.claim:
            return f"{said}: {self.why or 'no power of one setting explains it'}"
        if self.claim and not self.holds:
            return f"{said}: {self.why}"
        return prefix + said


def as_json(row: Row) -> str:
    plain = {k: None if v in (float("inf"), -float("inf")) else v for k, v in asdict(row).items()}
    return json.dumps(plain)


def write(path: Path, rows: Sequence[Row]) -> None:
    """The rows as a CSV."""
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            values = asdict(row) | {"gamma": as_power(row.gamma)}
            writer.writerow(f"{v:.4g}" if isinstance(v, float) else v for v in values.values())


def grid(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of adapters x optimizers: how many cases of each have which verdict."""
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    lines = []
    for adapter in dict.fromkeys(row.adapter for row in rows):
        line = [adapter]
        for optimizer in optimizers:
            cell = [r for r in rows if (r.adapter, r.optimizer) == (adapter, optimizer)]
            counts: dict[str, int] = {}
            for row in cell:
                word = row.verdict if row.claim or row.verdict == NONE else "no claim"
                word = {EQUAL: "bitwise", ROUNDED: "rounding"}.get(word, word)
                counts[word] = counts.get(word, 0) + 1
            line.append(", ".join(f"{count} {word}" for word, count in counts.items()))
        lines.append(line)
    return ["", *optimizers], lines


def summary(rows: Sequence[Row]) -> str:
    """How many of the claims hold."""
    claimed = [row for row in rows if row.claim in (EQUAL, ROUNDED)]
    bitwise = sum(row.verdict == EQUAL for row in claimed)
    said = f"{sum(r.holds for r in claimed)} of {len(claimed)} claimed equalities hold"
    said += f", {bitwise} of them in every bit"
    predicted = [row for row in rows if row.claim == DIFFERENT]
    if predicted:
        seen = sum(row.verdict == DIFFERENT for row in predicted)
        said += f"; {seen} of {len(predicted)} predicted differences are seen"
    return said
