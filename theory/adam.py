"""Theorem. Adam with bias correction and eps > 0 is equivariant under

    (theta, g)  ->  (s theta, g / s)     with     lr' = s lr,   eps' = eps / s,   betas kept,

    Adam:   wd' = wd / s**2    decay coupled: added to the gradient
    AdamW:  wd' = wd / s       decay decoupled: theta <- (1 - lr wd) theta, so lr wd is kept

and with no other lr', eps', wd'.

Proof. With wd' = wd / s**2 the gradient that Adam sees, decay included, scales by 1 / s. The
running means m of gradients and v of their squares start at zero and are linear, so they scale by
1 / s and 1 / s**2; the bias corrections depend on the count of steps only. So the direction
m / (sqrt(v) + eps) is unchanged with eps' = eps / s, and s theta - lr' direction equals
s (theta - lr direction) exactly when lr' = s lr. In AdamW the factor 1 - lr' wd' must equal
1 - lr wd, hence wd' = wd / s.

No other choice: at the first step m and v are zero before, so the direction is g / (|g| + eps).
That the two sides agree for all g > 0 and theta > 0 is an equation between polynomials in g and
theta, and its coefficients leave one solution.                                                []

`identities` solves that equation, compares the solution with the table that rewrites runs
(lyco_lab.gamma.POWERS), and puts it back into the first step and into a step at any count t with
any m and v. tests/theory/test_adam.py checks that `adam` and `adamw` are what torch.optim does.
"""

from collections.abc import Iterator

import sympy as sp

from theory import Identity
from theory._equivariance import Rule, Values

WEIGHTS = {"theta": 1, "grad": -1, "mean": -1, "square": -2, "steps": 0}
FIRST = {
    "theta": sp.Symbol("theta", positive=True),
    "grad": sp.Symbol("grad", positive=True),
    "mean": sp.Integer(0),
    "square": sp.Integer(0),
    "steps": sp.Integer(0),
}
LATER = {
    "theta": sp.Symbol("theta", real=True),
    "grad": sp.Symbol("grad", real=True),
    "mean": sp.Symbol("m", real=True),
    "square": sp.Symbol("v", positive=True),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
HYPER = {
    "lr": sp.Symbol("lr", positive=True),
    "eps": sp.Symbol("eps", positive=True),
    "weight_decay": sp.Symbol("wd", positive=True),
    "beta1": sp.Symbol("beta1", positive=True),
    "beta2": sp.Symbol("beta2", positive=True),
}


def _descend(theta: sp.Expr, grad: sp.Expr, state: Values, hyper: Values) -> dict[str, sp.Expr]:
    """What Adam and AdamW share: the step from `theta` along the corrected means of `grad`."""
    beta1, beta2 = hyper["beta1"], hyper["beta2"]
    steps = state["steps"] + 1
    mean = beta1 * state["mean"] + (1 - beta1) * grad
    square = beta2 * state["square"] + (1 - beta2) * grad**2
    denominator = sp.sqrt(square / (1 - beta2**steps)) + hyper["eps"]
    direction = mean / (1 - beta1**steps) / denominator
    return {
        "theta": theta - hyper["lr"] * direction,
        "mean": mean,
        "square": square,
        "steps": steps,
    }


def adam(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    """One step of torch.optim.Adam, whose decay is added to the gradient."""
    theta = state["theta"]
    return _descend(theta, state["grad"] + hyper["weight_decay"] * theta, state, hyper)


def adamw(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    """One step of torch.optim.AdamW, whose decay is applied to the factors first."""
    theta = state["theta"] * (1 - hyper["lr"] * hyper["weight_decay"])
    return _descend(theta, state["grad"], state, hyper)


RULES = tuple(
    (
        Rule(f"{name}, first step", optimizer, step, FIRST, WEIGHTS, HYPER),
        Rule(f"{name}, any later step", optimizer, step, LATER, WEIGHTS, HYPER),
    )
    for name, optimizer, step in (("Adam", "adam", adam), ("AdamW", "adamw", adamw))
)


def identities() -> Iterator[Identity]:
    for first, later in RULES:
        solution = first.solve()
        yield from first.solution_is_the_table(solution)
        yield from first.is_equivariant(solution)
        yield from later.is_equivariant(solution)
