"""Theorem. Adam with bias correction and eps > 0, with or without AMSGrad, is equivariant under

    (theta, g)  ->  (s theta, g / s)     with     lr' = s lr,   eps' = eps / s,   betas kept,

    Adam:   wd' = wd / s**2    decay coupled: added to the gradient
    AdamW:  wd' = wd / s       decay decoupled: theta <- (1 - lr wd) theta, so lr wd is kept

and with no other powers of s.

Proof. With wd' = wd / s**2 the gradient that Adam sees, decay included, scales by 1 / s. The
running means m of gradients and v of their squares start at zero and are linear, so they scale by
1 / s and 1 / s**2, and so does the largest v so far, which AMSGrad divides by; the bias corrections
depend on the count of steps only. So the direction m / (sqrt(v) + eps) is unchanged with
eps' = eps / s, and s theta - lr' direction equals s (theta - lr direction) exactly when lr' = s lr.
In AdamW the factor 1 - lr' wd' must equal 1 - lr wd, hence wd' = wd / s.                        []

`adam` and `adamw` are what torch.optim.Adam and AdamW do.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import REAL, Rule, Values, largest, proved, symbols

HYPER = symbols("lr eps weight_decay beta1 beta2", positive=True)
STATE = {
    **symbols("theta grad mean", **REAL),
    "square": sp.Symbol("v", positive=True),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
AMSGRAD = STATE | {"largest": sp.Symbol("v_max", positive=True)}
WEIGHTS = {"theta": 1, "grad": -1, "mean": -1, "square": -2, "largest": -2, "steps": 0}


def _descend(theta: sp.Expr, grad: sp.Expr, state: Values, hyper: Values) -> dict[str, sp.Expr]:
    """What all of them share: the step from `theta` along the corrected means of `grad`."""
    beta1, beta2 = hyper["beta1"], hyper["beta2"]
    steps = state["steps"] + 1
    mean = beta1 * state["mean"] + (1 - beta1) * grad
    divisor = square = beta2 * state["square"] + (1 - beta2) * grad**2
    memory = {"mean": mean, "square": square, "steps": steps}
    if "largest" in state:  # AMSGrad
        divisor = memory["largest"] = largest(state["largest"], square)
    denominator = sp.sqrt(divisor / (1 - beta2**steps)) + hyper["eps"]
    direction = mean / (1 - beta1**steps) / denominator
    return {"theta": theta - hyper["lr"] * direction, **memory}


def adam(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    """The decay is added to the gradient."""
    theta = state["theta"]
    return _descend(theta, state["grad"] + hyper["weight_decay"] * theta, state, hyper)


def adamw(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    """The decay is applied to the factors first."""
    theta = state["theta"] * (1 - hyper["lr"] * hyper["weight_decay"])
    return _descend(theta, state["grad"], state, hyper)


RULES = tuple(
    (Rule(f"{name}{variant}", step, state, WEIGHTS, HYPER, OPTIMIZERS[kind].powers),)
    for name, kind, step in (("Adam", "adam", adam), ("AdamW", "adamw", adamw))
    for variant, state in (("", STATE), (" with AMSGrad", AMSGRAD))
)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
