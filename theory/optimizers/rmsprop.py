"""Theorem. RMSprop, centred or not, with momentum and coupled decay, is equivariant under
(theta, g) -> (s theta, g / s) with

    lr' = s lr,      eps' = eps / s,      wd' = wd / s**2,      alpha and momentum kept,

and with no other powers of s.

Proof. With wd' = wd / s**2 the decayed gradient d scales by 1 / s, its running mean square v by
1 / s**2, and so does v - (mean d)**2, which the centred form divides by the root of. Then
d / (sqrt(v) + eps) is unchanged with eps' = eps / s, hence the buffer of such terms is, and
s theta - lr' buffer is s (theta - lr buffer) exactly when lr' = s lr.                            []

`step` is what torch.optim.RMSprop does; momentum = 0 is its rule without a buffer.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import REAL, Rule, Values, proved, symbols

HYPER = symbols("lr eps weight_decay alpha momentum", positive=True)
PLAIN = symbols("theta grad buffer", **REAL) | {"square": sp.Symbol("v", positive=True)}
CENTRED = PLAIN | symbols("mean", **REAL)
WEIGHTS = {"theta": 1, "grad": -1, "mean": -1, "square": -2, "buffer": 0}


def step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    """Centred where the state holds a mean."""
    theta, alpha = state["theta"], hyper["alpha"]
    grad = state["grad"] + hyper["weight_decay"] * theta
    memory = {"square": alpha * state["square"] + (1 - alpha) * grad**2}
    spread = memory["square"]
    if "mean" in state:
        memory["mean"] = alpha * state["mean"] + (1 - alpha) * grad
        spread = spread - memory["mean"] ** 2
    memory["buffer"] = hyper["momentum"] * state["buffer"] + grad / (sp.sqrt(spread) + hyper["eps"])
    return {"theta": theta - hyper["lr"] * memory["buffer"], **memory}


RULES = tuple(
    (Rule(name, step, state, WEIGHTS, HYPER, OPTIMIZERS["rmsprop"].powers),)
    for name, state in (("RMSprop", PLAIN), ("RMSprop centred", CENTRED))
)


def identities() -> Iterator[Identity]:
    for rules in RULES:
        yield from proved(*rules)
