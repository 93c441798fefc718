"""Theorem. SparseAdam is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s lr,      eps' = eps / s,      betas kept,

and with no other powers of s.

Proof. It is Adam (theory/optimizers/adam.py) without decay, on the entries that have a gradient;
which ones have does not depend on s, and the others and their memory stay as they are. Its eps is
added to sqrt(v) before the bias of v is corrected, where it scales by 1 / s as well.             []

`step` is what torch.optim.SparseAdam does to an entry that has a gradient.
"""

from collections.abc import Iterator

import sympy as sp

from theory import Identity
from theory._equivariance import REAL, Rule, Values, proved, symbols

HYPER = symbols("lr eps beta1 beta2", positive=True)
STATE = {
    **symbols("theta grad mean", **REAL),
    "square": sp.Symbol("v", positive=True),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
WEIGHTS = {"theta": 1, "grad": -1, "mean": -1, "square": -2, "steps": 0}
POWERS = {"lr": 1, "eps": -1}


def step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    beta1, beta2 = hyper["beta1"], hyper["beta2"]
    steps = state["steps"] + 1
    mean = beta1 * state["mean"] + (1 - beta1) * state["grad"]
    square = beta2 * state["square"] + (1 - beta2) * state["grad"] ** 2
    rate = hyper["lr"] * sp.sqrt(1 - beta2**steps) / (1 - beta1**steps)
    theta = state["theta"] - rate * mean / (sp.sqrt(square) + hyper["eps"])
    return {"theta": theta, "mean": mean, "square": square, "steps": steps}


RULES = ((Rule("SparseAdam", step, STATE, WEIGHTS, HYPER, POWERS),),)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
