"""Theorem. NAdam is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s lr,      eps' = eps / s,      betas and momentum_decay kept,

    coupled decay:    wd' = wd / s**2         decoupled:   wd' = wd / s

and with no other powers of s.

Proof. The momenta mu_t = beta1 (1 - 0.96**(t momentum_decay) / 2) and their running product depend
on the count of steps only. The step moves along a combination of the decayed gradient and of its
running mean, with coefficients made of these, divided by sqrt(v^) + eps: numerator and denominator
both scale by 1 / s, as in Adam (theory/optimizers/adam.py), and the rest of the proof is Adam's. []

`step` is what torch.optim.NAdam does.
"""

from collections.abc import Iterator
from functools import partial

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import REAL, Rule, Values, proved, symbols

HYPER = symbols("lr eps weight_decay beta1 beta2 momentum_decay", positive=True)
STATE = {
    **symbols("theta grad mean", **REAL),
    "square": sp.Symbol("v", positive=True),
    "product": sp.Symbol("M", positive=True),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
WEIGHTS = {"theta": 1, "grad": -1, "mean": -1, "square": -2, "product": 0, "steps": 0}


def momentum(steps: sp.Expr, hyper: Values) -> sp.Expr:
    return hyper["beta1"] * (1 - sp.Rational(24, 25) ** (steps * hyper["momentum_decay"]) / 2)


def step(state: Values, hyper: Values, decoupled: bool = False) -> dict[str, sp.Expr]:
    theta, grad, lr, decay = state["theta"], state["grad"], hyper["lr"], hyper["weight_decay"]
    steps = state["steps"] + 1
    if decoupled:
        theta = theta * (1 - lr * decay)
    else:
        grad = grad + decay * theta
    now, ahead = momentum(steps, hyper), momentum(steps + 1, hyper)
    product = state["product"] * now
    mean = hyper["beta1"] * state["mean"] + (1 - hyper["beta1"]) * grad
    square = hyper["beta2"] * state["square"] + (1 - hyper["beta2"]) * grad**2
    denominator = sp.sqrt(square / (1 - hyper["beta2"] ** steps)) + hyper["eps"]
    numerator = (1 - now) / (1 - product) * grad + ahead / (1 - product * ahead) * mean
    return {
        "theta": theta - lr * numerator / denominator,
        "mean": mean,
        "square": square,
        "product": product,
        "steps": steps,
    }


def _rule(name: str, decoupled: bool, kind: str) -> Rule:
    powers = OPTIMIZERS[kind].powers
    move = partial(step, decoupled=decoupled)
    return Rule(name, move, STATE, WEIGHTS, HYPER, powers, {"product": 1})


# Decoupled, the decay moves as AdamW's does.
RULES = ((_rule("NAdam", False, "nadam"),), (_rule("NAdam with decoupled decay", True, "adamw"),))


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
