"""Theorem. Averaged SGD is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s**2 lr,      lambd' = lambd / s**2,      wd' = wd / s**2,      alpha and t0 kept,

and with no other powers of s.

Proof. The rate eta starts at lr and becomes lr / (1 + lambd lr t)**alpha, where lambd lr stays: it
scales by s**2. Then lambd eta stays, the decayed gradient g + wd theta scales by 1 / s, and
(1 - lambd eta) theta - eta (g + wd theta) by s. The average is linear in theta, with weights mu
that depend on the count of steps only, so it scales by s too.                                    []

`step` is what torch.optim.ASGD does.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import REAL, Rule, Values, largest, proved, symbols

HYPER = symbols("lr lambd weight_decay alpha t0", positive=True)
STATE = {
    **symbols("theta grad average", **REAL),
    **symbols("eta mu", positive=True),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
WEIGHTS = {"theta": 1, "grad": -1, "average": 1, "eta": 2, "mu": 0, "steps": 0}


def step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    theta, eta, lr, lambd = state["theta"], state["eta"], hyper["lr"], hyper["lambd"]
    steps = state["steps"] + 1
    grad = state["grad"] + hyper["weight_decay"] * theta
    theta = theta * (1 - lambd * eta) - eta * grad
    return {
        "theta": theta,
        "average": state["average"] + state["mu"] * (theta - state["average"]),
        "eta": lr / (1 + lambd * lr * steps) ** hyper["alpha"],
        "mu": 1 / largest(1, steps - hyper["t0"]),
        "steps": steps,
    }


START: dict[str, str | int | None] = {"eta": "lr", "mu": 1}
RULES = ((Rule("ASGD", step, STATE, WEIGHTS, HYPER, OPTIMIZERS["asgd"].powers, START),),)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
