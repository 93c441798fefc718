"""Theorem. Lion is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s lr,      wd' = wd / s (decoupled),      betas kept,

and with no other powers of s.

Proof. The running mean m scales by 1 / s, so the sign of beta1 m + (1 - beta1) g stays. Then
(1 - lr' wd') s theta - lr' sign is s ((1 - lr wd) theta - lr sign) exactly when lr' = s lr and
lr' wd' = lr wd. Here beta1 enters a sign only, and beta2 through the mean: the former could be
moved a little without effect on a given step, but not at every state.                            []

`step` is what lion_pytorch's Lion does. That beta1 must stay is not among the equations that are
solved, as its derivative is zero wherever the sign does not jump.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import REAL, Rule, Values, proved, symbols

HYPER = symbols("lr weight_decay beta1 beta2", positive=True)
STATE = symbols("theta grad mean", **REAL)
WEIGHTS = {"theta": 1, "grad": -1, "mean": -1}


def step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    lr, beta1, beta2 = hyper["lr"], hyper["beta1"], hyper["beta2"]
    mean, grad = state["mean"], state["grad"]
    direction = sp.sign(beta1 * mean + (1 - beta1) * grad)
    return {
        "theta": state["theta"] * (1 - lr * hyper["weight_decay"]) - lr * direction,
        "mean": beta2 * mean + (1 - beta2) * grad,
    }


RULES = ((Rule("Lion", step, STATE, WEIGHTS, HYPER, OPTIMIZERS["lion"].powers),),)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
