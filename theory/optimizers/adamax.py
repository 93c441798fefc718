"""Theorem. Adamax is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s lr,      eps' = eps / s,      wd' = wd / s**2 (coupled),      betas kept,

and with no other powers of s.

Proof. With wd' = wd / s**2 the decayed gradient d scales by 1 / s, hence so does its running mean
m. So does the running maximum u <- max(beta2 u, |d| + eps), as eps' does and a maximum commutes
with positive factors. The direction m / u is unchanged, and s theta - lr' m / u is
s (theta - lr m / u) exactly when lr' = s lr.                                                     []

`step` is what torch.optim.Adamax does. In it, max(a, b) is (a + b + |a - b|) / 2.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import REAL, Rule, Values, largest, proved, symbols

HYPER = symbols("lr eps weight_decay beta1 beta2", positive=True)
STATE = {
    **symbols("theta grad mean", **REAL),
    "norm": sp.Symbol("u", positive=True),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
WEIGHTS = {"theta": 1, "grad": -1, "mean": -1, "norm": -1, "steps": 0}


def step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    theta, beta1 = state["theta"], hyper["beta1"]
    steps = state["steps"] + 1
    grad = state["grad"] + hyper["weight_decay"] * theta
    mean = beta1 * state["mean"] + (1 - beta1) * grad
    norm = largest(hyper["beta2"] * state["norm"], sp.Abs(grad) + hyper["eps"])
    theta = theta - hyper["lr"] * mean / (1 - beta1**steps) / norm
    return {"theta": theta, "mean": mean, "norm": norm, "steps": steps}


RULES = ((Rule("Adamax", step, STATE, WEIGHTS, HYPER, OPTIMIZERS["adamax"].powers),),)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
