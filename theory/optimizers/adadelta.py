"""Theorem. Adadelta is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s**2 lr,      eps' = eps / s**2,      wd' = wd / s**2 (coupled),      rho kept,

and with no other powers of s.

Proof. With wd' = wd / s**2 the decayed gradient d scales by 1 / s and its mean square v by
1 / s**2, to which eps is added: eps' = eps / s**2. A step is delta = sqrt(u + eps) / sqrt(v + eps)
d, where u is the mean square of such steps. Let u scale by 1 / s**2, as it does at the start, where
it is zero. Then the fraction of roots stays, delta scales by 1 / s, and so the next u, a mean of u
and delta**2, by 1 / s**2. Hence lr' = s**2 lr. That u scales otherwise is ruled out by its eps.  []

Adadelta is meant to give steps the unit of the factors, by which lr would stay. But u grows out of
eps, which has the unit that v has. With an eps of its own for u, eps_u' = s**2 eps_u and lr' = lr
would do as well. At eps = 0 nothing ever moves.

`step` is what torch.optim.Adadelta does.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import REAL, Rule, Values, proved, symbols

HYPER = symbols("lr eps weight_decay rho", positive=True)
STATE = {
    **symbols("theta grad", **REAL),
    "square": sp.Symbol("v", positive=True),
    "steps": sp.Symbol("u", positive=True),
}
WEIGHTS = {"theta": 1, "grad": -1, "square": -2, "steps": -2}


def step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    """One eps for both roots; `eps_u`, if given, for that of the steps."""
    theta, rho, eps = state["theta"], hyper["rho"], hyper["eps"]
    grad = state["grad"] + hyper["weight_decay"] * theta
    square = rho * state["square"] + (1 - rho) * grad**2
    root = sp.sqrt(state["steps"] + hyper.get("eps_u", eps))
    delta = root / sp.sqrt(square + eps) * grad
    return {
        "theta": theta - hyper["lr"] * delta,
        "square": square,
        "steps": rho * state["steps"] + (1 - rho) * delta**2,
    }


RULES = ((Rule("Adadelta", step, STATE, WEIGHTS, HYPER, OPTIMIZERS["adadelta"].powers),),)
OWN_EPS = Rule(
    "Adadelta with an eps for u",
    step,
    STATE,
    WEIGHTS | {"steps": 2},
    HYPER | symbols("eps_u", positive=True),
    {"eps": -2, "eps_u": 2, "weight_decay": -2},
)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
    yield from OWN_EPS.is_equivariant()
    start = STATE | {"square": sp.Integer(0), "steps": sp.Integer(0)}
    moved = step(start, HYPER | {"eps": sp.Integer(0)})
    yield Identity("Adadelta at eps = 0 does not move", moved["theta"] - STATE["theta"])
