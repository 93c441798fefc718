"""Theorem. RAdam has two phases. While rho_t = rho_inf - 2 t beta2**t / (1 - beta2**t) is at most
5, its direction is the corrected running mean m^ of the gradients, of degree k = 1; later it is
that of Adam, of degree 0. Let the first phase have a factor u on lr (1: the rule as published).
With coupled decay, RAdam is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s lr,      u' = s u,      eps' = eps / s,      wd' = wd / s**2,      betas kept,

and with no other powers of s. It is not for any powers if u is not there to be moved; nor with
decoupled decay, if u multiplies the decay along with lr.

Proof. The phase depends on t and beta2 only, so both runs change it at the same step. As in Adam
(theory/optimizers/adam.py), m and v scale by 1 / s and 1 / s**2 with the coupled wd'. In the first
phase s theta - lr' u' m^ / s is s (theta - lr u m^) exactly when lr' u' = s**2 lr u; in the second
the direction is unchanged with eps', the rectification depends on t only, and lr' = s lr. Both hold
when u' = s u, and without u they contradict each other. With decoupled decay lr' u' wd' must be
lr u wd in the first phase, that is wd' = wd / s**2, and in the second wd' = wd / s.              []

At beta2 = 0.99 and at 0.999 the first phase is 5 steps long. With u = 1, `step` is what
torch.optim.RAdam does.
"""

from collections.abc import Iterator
from functools import partial

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Check, Counterexample
from theory._equivariance import REAL, Rule, Values, proved, solve, symbols

HYPER = symbols("lr unrectified_lr eps weight_decay beta1 beta2", positive=True)
STATE = {
    **symbols("theta grad mean", **REAL),
    "square": sp.Symbol("v", positive=True),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
WEIGHTS = {"theta": 1, "grad": -1, "mean": -1, "square": -2, "steps": 0}


def step(
    state: Values, hyper: Values, rectified: bool | None = None, decoupled: bool = False
) -> dict[str, sp.Expr]:
    """`rectified` names the phase; None, for numbers, looks at rho."""
    theta, grad, lr, decay = state["theta"], state["grad"], hyper["lr"], hyper["weight_decay"]
    beta1, beta2 = hyper["beta1"], hyper["beta2"]
    steps = state["steps"] + 1
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * steps * beta2**steps / (1 - beta2**steps)
    if rectified is None:
        rectified = rho > 5
    if not rectified:
        lr = lr * hyper.get("unrectified_lr", 1)
    if decoupled:
        theta = theta * (1 - lr * decay)
    else:
        grad = grad + decay * theta
    mean = beta1 * state["mean"] + (1 - beta1) * grad
    square = beta2 * state["square"] + (1 - beta2) * grad**2
    direction = mean / (1 - beta1**steps)
    if rectified:
        rectification = sp.sqrt(
            (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        )
        direction *= rectification * sp.sqrt(1 - beta2**steps) / (sp.sqrt(square) + hyper["eps"])
    return {"theta": theta - lr * direction, "mean": mean, "square": square, "steps": steps}


def _rules(name: str, hyper: Values, decoupled: bool = False) -> tuple[Rule, Rule]:
    powers = OPTIMIZERS["radam"].powers
    first = partial(step, rectified=False, decoupled=decoupled)
    later = partial(step, rectified=True, decoupled=decoupled)
    return (
        Rule(f"{name}, first phase", first, STATE, WEIGHTS, hyper, powers),
        Rule(f"{name}, second phase", later, STATE, WEIGHTS, hyper, powers),
    )


RULES = (_rules("RAdam", HYPER),)
PUBLISHED = {name: symbol for name, symbol in HYPER.items() if name != "unrectified_lr"}


def identities() -> Iterator[Check]:
    for rules in RULES:
        yield from proved(*rules)
    for claim, setting, phases in (
        ("RAdam with one lr: its phases ask for different powers", "lr", _rules("", PUBLISHED)),
        ("RAdam with decoupled decay: so they do", "weight_decay", _rules("", HYPER, True)),
    ):
        first, later = map(solve, phases)
        yield Counterexample(claim, sp.Integer(first[setting] - later[setting]))
