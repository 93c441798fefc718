"""Theorem. Rprop is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s lr,      the least and the largest step size moved by s,      etas kept,

and with no other powers of s.

Proof. The step sizes grow or shrink by etas according to the sign of g times the previous g, which
scaling by 1 / s**2 does not change, and are kept within bounds that scale as they do; they start at
lr. Each factor moves by its step size, in the direction of the sign of g, or not at all where the
sign has changed.                                                                                 []

`step` is what torch.optim.Rprop does. With sigma = sign(g previous) in {-1, 0, 1}, a choice between
three values is a polynomial in sigma.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
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

HYPER = {
    "lr": sp.Symbol("lr", positive=True),
    "step_sizes": column("size", 2, positive=True),  # the least and the largest
    "etas": column("eta", 2, positive=True),  # where the sign changes, and where it stays
}
STATE = symbols("theta grad previous", **REAL) | {"size": sp.Symbol("size", positive=True)}
WEIGHTS = {"theta": 1, "grad": -1, "previous": -1, "size": 1}


def step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    sigma = sp.sign(state["grad"] * state["previous"])
    shrink, grow = hyper["etas"]
    least, most = hyper["step_sizes"]
    factor = 1 - sigma**2 + (sigma**2 - sigma) / 2 * shrink + (sigma**2 + sigma) / 2 * grow
    size = smallest(largest(state["size"] * factor, least), most)
    grad = state["grad"] * (1 - (sigma**2 - sigma) / 2)  # forgotten where the sign has changed
    return {"theta": state["theta"] - sp.sign(grad) * size, "previous": grad, "size": size}


RULES = ((Rule("Rprop", step, STATE, WEIGHTS, HYPER, OPTIMIZERS["rprop"].powers, {"size": "lr"}),),)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
