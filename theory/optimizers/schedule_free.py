"""Theorem. Schedule-free AdamW is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s lr,      eps' = eps / s,      wd' = wd / s,      all else kept,

and with no other powers of s: the betas, the powers r and q of the averaging weights.

Proof. The mean square v scales by 1 / s**2, so u = g / (sqrt(v^) + eps) is unchanged with
eps' = eps / s, and u + wd y is with wd' = wd / s, as y, where the gradient is taken, scales by s.
So z - lr (u + wd y), the next z, scales by s exactly when lr' = s lr. The average has the weights
w_t = t**r (largest lr so far)**q, which scale by s**q, as their sum does: the share w_t has of
w_1 + ... + w_t stays, and what is mixed in such shares and in beta1 scales by s.                 []

`step` is what AdamWScheduleFree of the package schedulefree does; a warm-up multiplies lr by a
number of its own. Its parameter theta is y. What is used, x = (y - (1 - beta1) z) / beta1, is
linear in the two and scales by s too.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import REAL, Rule, Values, largest, proved, symbols

HYPER = symbols("lr eps weight_decay beta1 beta2 r weight_lr_power", positive=True)
STATE = {
    **symbols("theta grad z", **REAL),
    "square": sp.Symbol("v", positive=True),
    "lr_max": sp.Symbol("lr_max", positive=True),
    "weight_sum": sp.Symbol("w", positive=True),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
WEIGHTS = {
    "theta": 1,
    "grad": -1,
    "z": 1,
    "square": -2,
    "lr_max": 1,
    "weight_sum": HYPER["weight_lr_power"],
    "steps": 0,
}


def step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    y, z, lr, beta1, beta2 = (
        state["theta"],
        state["z"],
        *(hyper[x] for x in ("lr", "beta1", "beta2")),
    )
    steps = state["steps"] + 1
    square = beta2 * state["square"] + (1 - beta2) * state["grad"] ** 2
    direction = state["grad"] / (sp.sqrt(square / (1 - beta2**steps)) + hyper["eps"])
    direction = direction + hyper["weight_decay"] * y
    lr_max = largest(lr, state["lr_max"])
    weight = steps ** hyper["r"] * lr_max ** hyper["weight_lr_power"]
    weight_sum = state["weight_sum"] + weight
    share = weight / weight_sum
    return {
        "theta": (1 - share) * y + share * z + lr * (beta1 * (1 - share) - 1) * direction,
        "z": z - lr * direction,
        "square": square,
        "lr_max": lr_max,
        "weight_sum": weight_sum,
        "steps": steps,
    }


POWERS = OPTIMIZERS["schedulefree"].powers
RULES = ((Rule("Schedule-free AdamW", step, STATE, WEIGHTS, HYPER, POWERS, {"z": "theta"}),),)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
