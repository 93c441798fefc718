"""Theorem. Adagrad is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s lr,      eps' = eps / s,      wd' = wd / s**2 (coupled),
    initial_accumulator_value' = initial_accumulator_value / s**2,

lr_decay kept, and with no other powers of s.

Proof. With wd' = wd / s**2 the decayed gradient d scales by 1 / s and the sum of its squares, which
starts at initial_accumulator_value, by 1 / s**2. So d / (sqrt(sum) + eps) is unchanged with
eps' = eps / s, and lr / (1 + t lr_decay) must scale as theta does, for every count t.           []

`step` is what torch.optim.Adagrad does.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import REAL, Rule, Values, proved, symbols

HYPER = symbols("lr eps weight_decay lr_decay initial_accumulator_value", positive=True)
STATE = {
    **symbols("theta grad", **REAL),
    "sum": sp.Symbol("v", positive=True),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
WEIGHTS = {"theta": 1, "grad": -1, "sum": -2, "steps": 0}


def step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    theta = state["theta"]
    grad = state["grad"] + hyper["weight_decay"] * theta
    total = state["sum"] + grad**2
    lr = hyper["lr"] / (1 + state["steps"] * hyper["lr_decay"])
    theta = theta - lr * grad / (sp.sqrt(total) + hyper["eps"])
    return {"theta": theta, "sum": total, "steps": state["steps"] + 1}


START = {"sum": "initial_accumulator_value"}
RULES = ((Rule("Adagrad", step, STATE, WEIGHTS, HYPER, OPTIMIZERS["adagrad"].powers, START),),)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
