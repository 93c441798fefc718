"""What two traces have in common.

    error of W' - W     |D_A - D_R| / |D_R|, over all layers together
    error of the loss   |l_A - l_R| / |l_R|

Where every s is a power of two nothing is rounded differently, and a difference in one bit is a
difference. Elsewhere A rounds what R does not, and training amplifies that, by how much nobody
can say beforehand. So R is trained again with a rounding added at every step (trace.Rounding), up
to `SHADOWS` times until one explains the error: an entry of a gradient that is nearly 0 takes a
sign by chance, and after it such runs are up to twenty times as far apart as others of their
kind. The largest error that they have made up to a step is the measure of what rounding does
there. A step rounds an entry several times where those runs add one rounding, and both are drawn
at random: up to `ALLOWED` times the measure counts as rounding. A loss follows W', so of a loss
the measure is the larger of both errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lyco_lab.verify.trace import Trace

ALLOWED, SHADOWS = 10.0, 4

EQUAL, ROUNDED, DIFFERENT, NONE = "EQUAL", "EQUAL to rounding", "DIFFERENT", "NOT RUN"
UNTOLD = "NO POWER TO TELL"  # equal, as a wrong claim would be too


@dataclass(frozen=True)
class Verdict:
    """How A compares with R."""

    word: str
    steps: int
    layers: int
    delta_error: float  # after the last step
    loss_error: float  # of the last step
    rounding: float | None  # what rounding alone makes of W' - W; None: not needed
    first_step: int | None = None  # of a difference
    first_place: str = ""  # the loss, or a layer

    @property
    def equal(self) -> bool:
        return self.word in (EQUAL, ROUNDED)


def compare(base: Trace, other: Trace, shadows: Sequence[Trace] = ()) -> Verdict:
    """`shadows`: R with roundings added; none where bits are to be equal."""
    last, lost = base.steps, float("inf")
    same = Verdict(
        word=EQUAL,
        steps=last,
        layers=len(base.layers),
        delta_error=lost if other.stopped else error(base, other, last),
        loss_error=lost if other.stopped else relative(base.losses[-1], other.losses[-1]),
        rounding=max((error(base, shadow, last) for shadow in shadows), default=None),
    )
    first = first_bit(base, other)
    if first is None:
        return same
    if shadows:
        first = first_excess(base, other, shadows)
        if first is None:
            return replace(same, word=ROUNDED)
    return replace(same, word=DIFFERENT, first_step=first[0], first_place=first[1])


def first_bit(base: Trace, other: Trace, until: int | None = None) -> tuple[int, str] | None:
    """The first step and place where the two differ in a bit, among the first `until` steps."""
    for step in range(1, (until or base.steps) + 1):
        if step > other.steps:
            return step, f"the training, which stopped ({other.stopped})"
        if base.losses[step - 1] != other.losses[step - 1]:
            return step, "the loss"
        pairs = zip(base.layers, base.digests[step - 1], other.digests[step - 1], strict=True)
        for layer, ours, theirs in pairs:
            if ours != theirs:
                return step, layer
    if until is None:
        for layer, ours, theirs in zip(base.layers, base.exported, other.exported, strict=True):
            if ours != theirs:
                return base.steps, f"{layer} as it is exported"
    return None


def first_excess(
    base: Trace, other: Trace, shadows: Sequence[Trace], until: int | None = None
) -> tuple[int, str] | None:
    """The first step, and the place, where the two differ by more than rounding makes.

    Among the first `until` steps.
    """
    # What rounding has made so far: at least, of a single number, one unit in its last place.
    delta = loss = torch.finfo(torch.float32).eps
    for step in range(1, (until or base.steps) + 1):
        if step > other.steps:
            return step, f"the training, which stopped ({other.stopped})"
        ours = base.losses[step - 1]
        loss = max(loss, delta, *(relative(ours, shadow.losses[step - 1]) for shadow in shadows))
        if relative(ours, other.losses[step - 1]) > ALLOWED * loss:
            return step, "the loss"
        if step in base.values:
            delta = max(delta, *(error(base, shadow, step) for shadow in shadows))
            if error(base, other, step) > ALLOWED * delta:
                return step, farthest(base, other, step)
    return None


def error(base: Trace, other: Trace, step: int) -> float:
    """|D_A - D_R| / |D_R| after a step."""
    ours, theirs = (torch.cat([v.flatten() for v in t.values[step]]) for t in (base, other))
    gap, size = (float(torch.linalg.vector_norm(x.double())) for x in (theirs - ours, ours))
    if gap == 0:
        return 0.0
    return gap / size if size else float("inf")


def farthest(base: Trace, other: Trace, step: int) -> str:
    """The layer with the largest error."""
    pairs = zip(base.values[step], other.values[step], strict=True)
    errors = [float((a - b).norm() / a.norm().clamp(min=1e-30)) for a, b in pairs]
    return base.layers[errors.index(max(errors))]


def relative(ours: float, theirs: float) -> float:
    return abs(theirs - ours) / abs(ours)
