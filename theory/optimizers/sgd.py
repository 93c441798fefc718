"""Theorem. SGD with momentum, dampening, Nesterov's form and coupled weight decay is equivariant
under (theta, g) -> (s theta, g / s) with

    lr' = s**2 lr,      wd' = wd / s**2,      momentum and dampening unchanged,

and with no other powers of s.

Proof. The decayed gradient d = g + wd theta becomes g / s + wd' s theta, which is d / s exactly
when wd' = wd / s**2. The buffer b <- momentum b + (1 - dampening) d is linear in (b, d), and at
the first step it is d itself, so it too scales by 1 / s, and so does the direction (the buffer, or
d + momentum b for Nesterov). Then s theta - lr' direction / s = s (theta - lr direction) exactly
when lr' = s**2 lr. Every term is linear, so comparing coefficients leaves no other solution.  []

`step` is what torch.optim.SGD does.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import REAL, Rule, Values, proved, symbols

HYPER = symbols("lr weight_decay momentum dampening", positive=True)
FIRST = symbols("theta grad", **REAL)
LATER = FIRST | symbols("buffer", **REAL)


def step(state: Values, hyper: Values, nesterov: bool = False) -> dict[str, sp.Expr]:
    """A state without a buffer is the state before the first step."""
    theta, momentum = state["theta"], hyper["momentum"]
    direction = state["grad"] + hyper["weight_decay"] * theta
    if "buffer" in state:
        buffer = momentum * state["buffer"] + (1 - hyper["dampening"]) * direction
    else:
        buffer = direction
    direction = direction + momentum * buffer if nesterov else buffer
    return {"theta": theta - hyper["lr"] * direction, "buffer": buffer}


def nesterov_step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    return step(state, hyper, nesterov=True)


WEIGHTS = {"theta": 1, "grad": -1, "buffer": -1}
POWERS = OPTIMIZERS["sgd"].powers
RULES = tuple(
    (
        Rule(f"{name}, first step", move, FIRST, WEIGHTS, HYPER, POWERS),
        Rule(f"{name}, later step", move, LATER, WEIGHTS, HYPER, POWERS, {"buffer": None}),
    )
    for name, move in (("SGD", step), ("SGD with Nesterov", nesterov_step))
)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
