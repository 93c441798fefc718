"""Do runs that the theorem on gamma calls one train to one? Asked of runs that trained each.

    class                       its first run
    run, compared_with          the two runs
    claim                       of the theorem: bit for bit, up to rounding, or different
    difference                  |D - D'| / |D| at the end, D = W' - W of all layers together
    worst_layer                 the largest such quotient of a layer by itself
    losses_equal                whether all losses agree in every bit
    first_difference            the first step whose losses do not; empty where all do
    largest_loss_gap            the largest difference of two losses

A run is compared with the first of its class, and the first with the nearest of another class,
among those that differ from it in nothing but settings that gamma moves: they look alike.
"""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lyco_lab.adapters.layer_adapter import BIAS
from lyco_lab.adapters.mount import Mounted
from lyco_lab.analyse import gamma_pair
from lyco_lab.analyse.gamma_pair import Verdict
from lyco_lab.analyse.table import study_folder
from lyco_lab.config import Run, Study
from lyco_lab.diffusion.model import load
from lyco_lab.files import atomic
from lyco_lab.fold import BITWISE, ROUNDED, TRAIN, trained
from lyco_lab.formats import kohya
from lyco_lab.gamma import alike, classes, equivalent
from lyco_lab.integrity import METRICS
from lyco_lab.miniature import placed
from lyco_lab.record import Record

FOLDING = "folding.csv"
DIFFERENT = "different"
COLUMNS = (
    "class", "run", "compared_with", "claim", "difference", "worst_layer", "losses_equal",
    "first_difference", "largest_loss_gap",
)  # fmt: skip

Parts = dict[str, Mounted]


@dataclass(frozen=True)
class Gap:
    """Between two changes of the weights, as a share of the larger; 0 only if bits are equal."""

    total: float  # of all layers together
    worst: float  # the largest of a layer


@dataclass(frozen=True)
class Comparison:
    """Two runs, after training."""

    first: str  # of the class of `run`
    run: str
    other: str
    claim: str
    gap: Gap
    losses: Verdict

    @property
    def holds(self) -> bool | None:
        """None for a claim up to rounding: how far training carries rounding is seen, not known."""
        if self.claim == ROUNDED:
            return None
        same = self.gap.worst == 0 and self.losses.equal
        return same if self.claim == BITWISE else self.gap.worst > 0

    @property
    def sentence(self) -> str:
        gap = f"W' differs by {self.gap.total:.2g} of its change"
        gap += f" ({self.gap.worst:.2g} in the worst layer)"
        if self.claim == DIFFERENT:
            return f"{self.run} is not {self.other}, the nearest that looks like it: {gap}"
        named = f"{self.run} is {self.other} {self.claim}"
        if self.holds is None:
            return f"{named}: {gap}"
        if self.holds:
            return f"{named}: W' and all {self.losses.steps} losses are equal"
        return f"{named}, it was claimed, but {gap}; {self.losses.sentence}"

    @property
    def row(self) -> tuple[str, ...]:
        step = self.losses.first_difference
        return (
            self.first, self.run, self.other, self.claim, f"{self.gap.total:.3g}",
            f"{self.gap.worst:.3g}", str(self.losses.equal).lower(),
            "" if step is None else str(step.step), f"{self.losses.largest_gap:.3g}",
        )  # fmt: skip


def compare(study: Study, root: Path) -> list[Comparison]:
    """Every class of which two runs or more have trained, and what looks like one of it.

    Writes the study's folding.csv, unless there is nothing to compare.
    """
    known = [
        [run for run in each.runs if trained(Record(root / run.folder_name))]
        for each in classes(study.runs)
    ]
    if all(len(members) < 2 for members in known):
        return []
    found: list[Comparison] = []
    firsts = [members[0] for members in known if members]
    for members in filter(None, known):
        first = members[0]
        similar = [run for run in firsts if run is not first and alike(run, first)]
        parts = _read([*members, *similar], root)
        between = {run.name: difference(parts[first.name], parts[run.name]) for run in similar}
        if similar:
            nearest = min(similar, key=lambda run: between[run.name].total)
            pair = (first, nearest, DIFFERENT, between[nearest.name])
            found.append(_comparison(first, *pair, root))
        for run in members[1:]:
            how = BITWISE if equivalent(first, run).bitwise else ROUNDED
            gap = difference(parts[first.name], parts[run.name])
            found.append(_comparison(first, run, first, how, gap, root))
    _write(found, study_folder(study, root) / FOLDING)
    return found


def _comparison(first: Run, run: Run, other: Run, claim: str, gap: Gap, root: Path) -> Comparison:
    losses = [
        gamma_pair.read_losses(Record(root / each.folder_name).output(TRAIN, METRICS))
        for each in (run, other)
    ]
    verdict = gamma_pair.compare(run.name, other.name, *losses)
    return Comparison(first.name, run.name, other.name, claim, gap, verdict)


def _read(runs: list[Run], root: Path) -> dict[str, Parts]:
    """The trained adapters of runs of one model, which can be asked what they do to a weight."""
    models = load(placed(runs[0].model)).parts
    found = {}
    for run in runs:
        file = Record(root / run.folder_name).output(TRAIN, "adapter.safetensors")
        found[run.name] = kohya.apply(file, models)
        for mounted in found[run.name].values():
            mounted.detach()  # a layer carries no two that are equal
    return found


@torch.no_grad()
def difference(one: Parts, other: Parts) -> Gap:
    """How far apart two trained adapters of the same layers are."""
    squares, sizes, worst = 0.0, 0.0, 0.0
    for part, mounted in one.items():
        for layer in mounted.layers:
            pairs = zip(_changes(mounted, layer), _changes(other[part], layer), strict=True)
            for ours, theirs in pairs:
                apart = float((ours.double() - theirs.double()).norm())
                size = max(float(ours.double().norm()), float(theirs.double().norm()))
                squares, sizes = squares + apart**2, sizes + size**2
                worst = max(worst, apart / size if apart else 0.0)
    return Gap(math.sqrt(squares / sizes) if squares else 0.0, worst)


def _changes(mounted: Mounted, layer: str) -> list[Tensor]:
    """What a layer's weight gains, and what its bias does where that trains."""
    bias = mounted.factors(layer).get(BIAS)
    return [mounted.delta(layer), *([] if bias is None else [bias])]


def _write(found: list[Comparison], path: Path) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(each.row for each in found)
    with atomic(path) as temporary:
        temporary.write_text(buffer.getvalue())
