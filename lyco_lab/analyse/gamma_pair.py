"""Are two runs the same run, bit for bit? The check of the gamma theorem on the code that trains.

A study's `pairs` name two runs, one with merge ratio gamma and its rewriting without gamma
(initial factors and learning rate rescaled, lyco_lab/gamma.py). In exact arithmetic the theorem
says that both apply the same update at every step; when gamma**(1/m) is a power of two, floating
point is exact too, so every loss has to agree in every bit. A difference of one unit in the last
place is a difference.
"""

import csv
import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from lyco_lab.errors import UserError
from lyco_lab.files import atomic
from lyco_lab.readers import Damaged, read_csv

COLUMNS = ("pair", "step", "loss_gamma", "loss_rewritten")


@dataclass(frozen=True)
class Difference:
    step: int
    gamma: float
    rewritten: float


@dataclass(frozen=True)
class Verdict:
    """What comparing the losses of two runs found."""

    gamma_run: str
    rewritten_run: str
    losses: tuple[tuple[int, float, float], ...]  # step, loss with gamma, loss rewritten
    extra_steps: int  # steps that only one of the two runs has
    first_difference: Difference | None

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def equal(self) -> bool:
        """Equal in every bit at every step of both; comparing nothing proves nothing."""
        return self.first_difference is None and self.extra_steps == 0 and self.steps > 0

    @property
    def largest_gap(self) -> float:
        """The largest |difference| of two losses; NaN if one of them is NaN."""
        gaps = [abs(a - b) for _, a, b in self.losses if bits(a) != bits(b)]
        return max(gaps, key=lambda gap: (math.isnan(gap), gap), default=0.0)

    @property
    def sentence(self) -> str:
        pair = f"{self.gamma_run} and {self.rewritten_run}"
        if self.equal:
            return f"{pair}: all {self.steps} losses are bitwise equal."
        if self.first_difference is not None:
            d = self.first_difference
            return (
                f"{pair}: losses differ, first at step {d.step} "
                f"({d.gamma!r} against {d.rewritten!r}); {self.steps} steps compared."
            )
        if not self.steps:
            return f"{pair}: no step in common, nothing was compared."
        return (
            f"{pair}: the {self.steps} steps that both have are bitwise equal, "
            f"but one run has {self.extra_steps} more."
        )


def bits(value: float) -> bytes:
    """The value's IEEE 754 bits: tells 0.0 from -0.0. All NaNs are one; text has only one."""
    return b"NaN" if math.isnan(value) else struct.pack("<d", value)


def compare(
    gamma_run: str, rewritten_run: str, gamma: dict[int, float], rewritten: dict[int, float]
) -> Verdict:
    """Compare the losses {step: loss} of two runs at every step that both have."""
    both = sorted(gamma.keys() & rewritten.keys())
    losses = tuple((step, gamma[step], rewritten[step]) for step in both)
    first = next((Difference(*row) for row in losses if bits(row[1]) != bits(row[2])), None)
    extra = len(gamma.keys() ^ rewritten.keys())
    return Verdict(gamma_run, rewritten_run, losses, extra, first)


def read_losses(metrics: Path) -> dict[int, float]:
    """{step: loss} of a run's train/metrics.csv, every bit kept."""
    if not metrics.is_file():
        raise UserError(f"{metrics} does not exist: train that run first")
    try:
        return {int(row["step"]): exact(row["loss"]) for row in read_csv(metrics, ("step", "loss"))}
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise Damaged(metrics, f"a step or a loss is no number ({error})") from error


def exact(text: str) -> float:
    """A float written by `float.hex` or by `repr`; both lose nothing."""
    return float.fromhex(text) if "0x" in text else float(text)


def write(verdicts: list[Verdict], path: Path) -> None:
    """The compared losses as hexadecimal floats, so that the table is as exact as the claim."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for verdict in verdicts:
        pair = f"{verdict.gamma_run} = {verdict.rewritten_run}"
        writer.writerows([pair, s, a.hex(), b.hex()] for s, a, b in verdict.losses)
    with atomic(path) as temporary:
        temporary.write_text(buffer.getvalue())
