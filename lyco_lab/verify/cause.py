"""Why a claim does not hold: the power of s with which it would.

A claim rests on the powers by which settings move. Where A is different all the same, one setting
after another is moved by other powers, until W' is that of R at the first steps.
"""

from collections.abc import Iterator
from dataclasses import replace

from lyco_lab.config import Run
from lyco_lab.gamma import is_power_of_two
from lyco_lab.verify.case import Case
from lyco_lab.verify.trace import Bench, Trace, follow
from lyco_lab.verify.verdict import Verdict, first_bit

POWERS = range(-3, 4)
MORE_STEPS = 3  # after the first that differs


def search(case: Case, base: Trace, bench: Bench, verdict: Verdict) -> str:
    """What would make A equal to R, as a sentence; "" where nothing that was tried does."""
    assert verdict.first_step is not None
    if verdict.first_step == 1 and verdict.first_place == "the loss":
        return "the losses differ before any step is made: the start, or T, is not what is claimed"
    moving = [s for s in case.scales if s != 1]
    if len(moving) != 1 or case.other.train.groups or not is_power_of_two(moving[0]):
        return ""
    until = min(verdict.first_step + MORE_STEPS, base.steps)
    for setting, claimed, power, run in candidates(case.other, moving[0]):
        trace = follow(run, bench, until=until)
        if first_bit(base, trace, until) is None:
            return (
                f"equal if {setting} moved by s**{power}, where {case.optimizer} claims "
                f"s**{claimed}"
            )
    return ""


def candidates(run: Run, s: float) -> Iterator[tuple[str, int, int, Run]]:
    """(setting, the power claimed, another power, the run in which it moved by that)."""
    rule, train = run.optimizer_value(), run.train
    for setting, claimed in rule.powers.items():
        for power in sorted(POWERS, key=lambda p: abs(p - claimed)):
            if power == claimed:
                continue
            by = s ** (power - claimed)
            if setting == "lr":
                yield setting, claimed, power, replace(run, train=replace(train, lr=train.lr * by))
            else:
                moved = rule.moved({setting: by})
                described = {**run.optimizer, setting: getattr(moved, setting)}
                yield setting, claimed, power, replace(run, optimizer=described)
