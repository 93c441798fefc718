"""Theorem. Adafactor, whose steps are relative to the factors' size, is equivariant under
(theta, g) -> (s theta, g / s) with

    eps2' = s eps2,      and lr, d, the decay (decoupled) and its other settings kept,

and with no other powers of s, wherever its eps1 does not act. Of a vector, an eps1' = eps1 / s
extends this to where it does; of a matrix, no powers do.

Proof. The mean squares, of entries, rows or columns, scale by 1 / s**2, and so does their estimate
V = r c / mean(r) of a matrix's; hence u = g / sqrt(V) stays, and so does what is left of it once
its root mean square is cut down to d. The step is max(eps2, rms(theta)) min(lr, 1 / sqrt(t)) u:
with eps2' = s eps2 it scales by s with lr as it is. The decay multiplies theta by 1 - lr wd.

torch keeps V above eps1**2, which scales as V does with eps1' = eps1 / s, and of a matrix keeps
mean(r) above eps1, which scales as mean(r) does with eps1' = eps1 / s**2. One cannot do both.    []

With eps1 at both places, `step` is what torch.optim.Adafactor does; without, what lyco_lab's does.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Check, Counterexample
from theory._equivariance import (
    Rule,
    Values,
    column,
    largest,
    matrix,
    proved,
    smallest,
    solve,
    symbols,
)

HYPER = symbols("lr eps2 d weight_decay", positive=True) | symbols("beta2_decay", negative=True)
WITH_EPS1 = HYPER | symbols("eps_v", positive=True)
WITH_TWO = WITH_EPS1 | symbols("eps_r", positive=True)
STEPS = {"steps": sp.Symbol("t", positive=True, integer=True)}
VECTOR = STEPS | {
    "theta": column("theta", 2),
    "grad": column("g", 2),
    "square": column("v", 2, positive=True),
}
MATRIX = STEPS | {
    "theta": matrix("theta", 2, 3),
    "grad": matrix("g", 2, 3),
    "rows": column("r", 2, positive=True),
    "columns": matrix("c", 1, 3, positive=True),
}
WEIGHTS = {"theta": 1, "grad": -1, "square": -2, "rows": -2, "columns": -2, "steps": 0}


def rms(x: sp.Matrix) -> sp.Expr:
    return sp.sqrt(sum(entry**2 for entry in x) / len(x))


def step(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    """eps_v and eps_r, torch's eps1 at its two places, are missing where they do not act."""
    theta, grad, lr = state["theta"], state["grad"], hyper["lr"]
    steps = state["steps"] + 1
    new = steps ** hyper["beta2_decay"]
    squared = grad.applyfunc(lambda g: g**2)
    if "square" in state:
        memory = {"square": state["square"] + new * (squared - state["square"])}
        estimate = memory["square"]
    else:
        height, width = grad.shape
        rows = squared * sp.ones(width, 1) / width
        columns = sp.ones(1, height) * squared / height
        memory = {
            "rows": state["rows"] + new * (rows - state["rows"]),
            "columns": state["columns"] + new * (columns - state["columns"]),
        }
        mean = sum(memory["rows"]) / height
        if "eps_r" in hyper:
            mean = largest(mean, hyper["eps_r"])
        estimate = memory["rows"] * memory["columns"] / mean
    if "eps_v" in hyper:
        estimate = estimate.applyfunc(lambda v: largest(v, hyper["eps_v"] ** 2))
    u = sp.Matrix(*grad.shape, lambda i, j: grad[i, j] / sp.sqrt(estimate[i, j]))
    size = largest(hyper["eps2"], rms(theta)) * smallest(lr, 1 / sp.sqrt(steps))
    kept = (1 - lr * hyper["weight_decay"]) * theta
    return {
        "theta": kept - size / largest(1, rms(u) / hyper["d"]) * u,
        "steps": steps,
        **memory,
    }


POWERS = OPTIMIZERS["adafactor"].powers
EPS1 = {**POWERS, "eps_v": -1}
RULES = (
    (Rule("Adafactor of a vector", step, VECTOR, WEIGHTS, HYPER, POWERS),),
    (Rule("Adafactor of a matrix", step, MATRIX, WEIGHTS, HYPER, POWERS),),
    (Rule("Adafactor of a vector with eps1", step, VECTOR, WEIGHTS, WITH_EPS1, EPS1),),
    (
        Rule(
            "Adafactor of a matrix with two eps1",
            step,
            MATRIX,
            WEIGHTS,
            WITH_TWO,
            EPS1 | {"eps_r": -2},
        ),
    ),
)


def identities() -> Iterator[Check]:
    for rules in RULES:
        yield from proved(*rules)
    powers = solve(*RULES[-1])
    claim = "Adafactor of a matrix: no power of one eps1 is that of both"
    yield Counterexample(claim, sp.Integer(powers["eps_v"] - powers["eps_r"]))
