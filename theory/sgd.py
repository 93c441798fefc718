"""Theorem. SGD with momentum, dampening, Nesterov's form and coupled weight decay is equivariant
under (theta, g) -> (s theta, g / s) with

    lr' = s**2 lr,      wd' = wd / s**2,      momentum and dampening unchanged,

and with no other lr', wd'.

Proof. The decayed gradient d = g + wd theta becomes g / s + wd' s theta, which is d / s exactly
when wd' = wd / s**2. The buffer b <- momentum b + (1 - dampening) d is linear in (b, d), and at
the first step it is d itself, so it too scales by 1 / s, and so does the direction (the buffer, or
d + momentum b for Nesterov). Then s theta - lr' direction / s = s (theta - lr direction) exactly
when lr' = s**2 lr. Every term is linear, so comparing coefficients leaves no other solution.  []

`identities` solves for lr' and wd' at the first step, where the buffer starts, and at a later one,
compares them with the table that rewrites runs (lyco_lab.gamma.POWERS), and puts them back into the
step. tests/theory/test_sgd.py checks that `step` is what torch.optim.SGD does.
"""

from collections.abc import Iterator

import sympy as sp

from theory import Identity
from theory._equivariance import Rule, Values

WEIGHTS = {"theta": 1, "grad": -1, "buffer": -1}
FIRST = {name: sp.Symbol(name, real=True) for name in ("theta", "grad")}
LATER = FIRST | {"buffer": sp.Symbol("buffer", real=True)}
HYPER = {
    "lr": sp.Symbol("lr", positive=True),
    "weight_decay": sp.Symbol("wd", positive=True),
    "momentum": sp.Symbol("momentum", positive=True),
    "dampening": sp.Symbol("dampening", positive=True),
}


def step(state: Values, hyper: Values, nesterov: bool = False) -> dict[str, sp.Expr]:
    """One step of torch.optim.SGD; a state without a buffer is the state before the first."""
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


RULES = (
    Rule("SGD, first step", "sgd", step, FIRST, WEIGHTS, HYPER),
    Rule("SGD, later step", "sgd", step, LATER, WEIGHTS, HYPER),
    Rule("SGD (Nesterov), first step", "sgd", nesterov_step, FIRST, WEIGHTS, HYPER),
    Rule("SGD (Nesterov), later step", "sgd", nesterov_step, LATER, WEIGHTS, HYPER),
)


def identities() -> Iterator[Identity]:
    for rule in RULES:
        solution = rule.solve()
        yield from rule.solution_is_the_table(solution)
        yield from rule.is_equivariant(solution)
