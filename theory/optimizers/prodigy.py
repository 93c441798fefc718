"""Theorem. Prodigy is equivariant under (theta, g) -> (s theta, g / s) with

    d0' = s d0,      eps' = eps / s,      lr and all else kept,

    decoupled decay:    wd' = wd / s        coupled:    wd' = wd / s**2

if all factors that it trains have the same s, and with no other powers of s unless d_coef moves,
against which lr and d0 can be traded.

Proof. Its estimate d of a distance starts at d0 and scales by s, so d g stays, and so do the
running means m of d g and v of (d g)**2, and p, the running sum of d g times numbers that stay. The
sum q of <g, theta_0 - theta> d, times such numbers, scales by s: gradients by 1 / s, distances by
s. So d_coef q / |p|_1 scales by s, as does the new d, a maximum or minimum of such numbers. With
eps' = eps / s the direction m / (sqrt(v) + d eps) stays, and with decoupled wd' = wd / s so does
d lr wd: the step scales by s with lr as it is. Coupled, g + wd theta scales by 1 / s.

q and |p|_1 are sums over all factors. With two of different s, neither sum scales by any power. []

`step`, for two factors of one entry each, is what Prodigy of the package prodigyopt does.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Check, Counterexample
from theory._equivariance import (
    REAL,
    Rule,
    Values,
    column,
    largest,
    proved,
    smallest,
    symbols,
)

HYPER = symbols("lr d0 eps weight_decay beta1 beta2 beta3 d_coef growth_rate", positive=True)
LATER = {
    **{name: column(name, 2) for name in ("theta", "grad", "start", "mean", "sum")},
    "square": column("v", 2, positive=True),
    **symbols("d d_max", positive=True),
    **symbols("numerator", **REAL),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
EARLY = LATER | {"d": HYPER["d0"], "d_max": HYPER["d0"]}  # as long as d is d0
WEIGHTS = {"theta": 1, "grad": -1, "start": 1, "mean": 0, "square": 0, "sum": 0}
WEIGHTS |= {"d": 1, "d_max": 1, "numerator": 1, "steps": 0}
START = {"start": "theta", "d": "d0", "d_max": "d0"}


def step(
    state: Values, hyper: Values, decoupled: bool = True, warm: bool = False
) -> dict[str, sp.Expr]:
    """With correction of bias; `warm`: safeguard_warmup."""
    theta, grad, d, d0 = state["theta"], state["grad"], state["d"], hyper["d0"]
    beta1, beta2, beta3, decay = (hyper[k] for k in ("beta1", "beta2", "beta3", "weight_decay"))
    steps = state["steps"] + 1
    rate = d * hyper["lr"] * sp.sqrt(1 - beta2**steps) / (1 - beta1**steps)
    if not decoupled:
        grad = grad + decay * theta
    way = (grad.T * (state["start"] - theta))[0]
    numerator = beta3 * state["numerator"] + d / d0 * rate * way
    mean = beta1 * state["mean"] + (1 - beta1) * d * grad
    square = beta2 * state["square"] + (1 - beta2) * d**2 * grad.applyfunc(lambda g: g**2)
    total = beta3 * state["sum"] + d / d0 * (d if warm else rate) * grad

    guess = hyper["d_coef"] * numerator / sum(map(sp.Abs, total))
    new = largest(d, guess) if d == d0 else d
    d_max = largest(state["d_max"], guess)
    new = smallest(d_max, new * hyper["growth_rate"])

    if decoupled:
        theta = theta * (1 - rate * decay)
    moves = [m / (sp.sqrt(v) + new * hyper["eps"]) for m, v in zip(mean, square, strict=True)]
    return {
        "theta": theta - rate * sp.Matrix(moves),
        "start": state["start"],
        "mean": mean,
        "square": square,
        "sum": total,
        "numerator": numerator,
        "d": new,
        "d_max": d_max,
        "steps": steps,
    }


def _rules(name: str, powers: Mapping[str, int], decoupled: bool, warm: bool) -> tuple[Rule, Rule]:
    move = partial(step, decoupled=decoupled, warm=warm)
    return (
        Rule(f"{name}, while d = d0", move, EARLY, WEIGHTS, HYPER, powers, START),
        Rule(f"{name}, later", move, LATER, WEIGHTS, HYPER, powers, START),
    )


POWERS = OPTIMIZERS["prodigy"].powers
RULES = (
    _rules("Prodigy", POWERS, True, False),
    _rules("Prodigy with safeguard_warmup", POWERS, True, True),
    _rules("Prodigy with coupled decay", {**POWERS, "weight_decay": -2}, False, False),
)


def two_scales() -> sp.Expr:
    """What is left for the second factor, if the settings move as the first one asks.

    The first of two factors is scaled by 2, the second by 4.
    """
    hyper = {name: sp.Rational(1, i + 2) for i, name in enumerate(HYPER)}
    powers = RULES[0][0].powers
    moved = {name: sp.Integer(2) ** powers.get(name, 0) * x for name, x in hyper.items()}
    theta, grad = sp.Matrix([1, 2]), sp.Matrix([3, 5])
    scales = sp.diag(2, 4)

    def after_first(theta: sp.Matrix, grad: sp.Matrix, hyper: Values) -> sp.Matrix:
        state = RULES[0][0].beginning(theta, hyper) | {"grad": grad}
        return step(state, hyper)["theta"]

    there = after_first(scales * theta, scales.inv() * grad, moved)
    return (there - scales * after_first(theta, grad, hyper))[1]


def identities() -> Iterator[Check]:
    for rules in RULES:
        yield from proved(*rules, kept=["d_coef"])
    yield Counterexample("Prodigy with two scales: the second factor is missed", two_scales())
