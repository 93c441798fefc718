"""Whether a case could have told a wrong claim: A again, with one setting moved by a wrong power.

An equality of two runs says something of a setting only if it shows in them. A decay that is lost
in rounding may be moved by any power. So each setting of the optimizer is moved by the nearest
power that is not claimed, the one that makes it smaller, and that run has to differ from R, by more
than what is let pass as rounding. Which settings are tried does not depend on what is claimed:
those of `COMMON` are, wherever the optimizer has them, beside all that are claimed to move.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lyco_lab.config import Run
from lyco_lab.errors import UserError
from lyco_lab.gamma import rewrite, scales_to
from lyco_lab.verify.case import Case
from lyco_lab.verify.trace import Bench, Trace, follow
from lyco_lab.verify.verdict import first_bit, first_excess

COMMON = ("lr", "eps", "weight_decay")
FIRST = 2  # steps, which mostly are enough


def unseen(case: Case, base: Trace, bench: Bench, shadows: Sequence[Trace]) -> str:
    """The first setting of which a wrong power would not be seen, as a sentence; "" for none."""
    for setting, claimed, power, run in wrong(case):
        if not seen(run, base, bench, shadows):
            place = "train.lr" if setting == "lr" else f"optimizer.{setting}"
            return (
                f"with {setting} moved by s**{power} in the place of s**{claimed} A would look the "
                f"same; take more --steps, --dtype fp32, a power of two for --gamma, or a larger "
                f"{place}"
            )
    return ""


def wrong(case: Case) -> Iterator[tuple[str, int, int, Run]]:
    """(setting, the power claimed, another power, A rewritten with that)."""
    rule, run = case.base.optimizer_value(), case.base
    scales = Counter(s for s in scales_to(run, case.gamma, carry=case.carry).values() if s != 1)
    if not scales:  # then nothing moves
        return
    (s, _), *_ = scales.most_common(1)
    for setting in dict.fromkeys((*COMMON, *rule.powers)):
        if not shown(run, setting):
            continue
        claimed = rule.powers.get(setting, 0)
        power = claimed - 1 if s > 1 else claimed + 1
        powers = {**rule.powers, setting: power}
        try:
            other = rewrite(run, case.gamma, carry=case.carry, powers=powers)
        except UserError:  # such a setting is refused, and so would be noticed
            continue
        yield setting, claimed, power, other


def shown(run: Run, setting: str) -> bool:
    """Whether the run has such a setting, and it is not 0."""
    rule = run.optimizer_value()
    value: Any = run.train.lr if setting == "lr" else getattr(rule, setting, None)
    return any(value) if isinstance(value, tuple | list) else bool(value)


def seen(run: Run, base: Trace, bench: Bench, shadows: Sequence[Trace]) -> bool:
    """Whether the run differs from R; by more than rounding makes, where there are shadows."""
    for until in dict.fromkeys((min(FIRST, base.steps), base.steps)):
        trace = follow(run, bench, until=until)
        if shadows:
            found = first_excess(base, trace, shadows, until)
        else:
            found = first_bit(base, trace, until)
        if found is not None:
            return True
    return False
