"""Theorem. Muon is equivariant under (theta, g) -> (s theta, g / s), for matrices, with

    lr' = s lr,      eps' = eps / s,      wd' = wd / s (decoupled),      momentum kept,

and with no other powers of s.

Proof. The running mean of the gradients scales by 1 / s, hence so does n (the mean, or with
Nesterov its mix with the gradient), and its norm |n|. So X = n / max(|n|, eps) is unchanged with
eps' = eps / s, and with X whatever is made of it: here the orthogonalisation, times a number that
depends on the matrix's shape. Then (1 - lr wd) theta - lr O scales by s exactly when lr' = s lr and
lr' wd' = lr wd.                                                                                  []

The identities hold for any function of X in place of the orthogonalisation; the powers are derived
with `newton_schulz`. torch rounds n and what follows to bfloat16, which commutes with a division by
s if s is a power of two, and if not only up to this rounding, of up to 1 in 256. But for that,
`step` with `newton_schulz` is what torch.optim.Muon does.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import Rule, Values, derived, largest, matrix, symbols

HYPER = symbols("lr eps weight_decay momentum", positive=True)
STATE = {name: matrix(name, 3, 2) for name in ("theta", "grad", "mean")}
WEIGHTS = {"theta": 1, "grad": -1, "mean": -1}


def newton_schulz(x: sp.Matrix) -> sp.Matrix:
    """Five steps that bring the singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.T if x.rows > x.cols else x
    for _ in range(5):
        gram = wide * wide.T
        wide = a * wide + (b * gram + c * gram * gram) * wide
    return wide.T if x.rows > x.cols else wide


def anything(x: sp.Matrix) -> sp.Matrix:
    """A function of which nothing is known for every entry."""
    return sp.Matrix(*x.shape, lambda i, j: sp.Function(f"O_{i + 1}{j + 1}", real=True)(*x))


def step(
    state: Values,
    hyper: Values,
    nesterov: bool = False,
    orthogonal: Callable[[sp.Matrix], sp.Matrix] = newton_schulz,
) -> dict[str, sp.Matrix]:
    theta, grad, lr, momentum = state["theta"], state["grad"], hyper["lr"], hyper["momentum"]
    mean = momentum * state["mean"] + (1 - momentum) * grad
    n = momentum * mean + (1 - momentum) * grad if nesterov else mean
    norm = sp.sqrt(sum(entry**2 for entry in n))
    direction = orthogonal(n / largest(norm, hyper["eps"]))
    tall = sp.sqrt(max(sp.Integer(1), sp.Rational(theta.rows, theta.cols)))
    kept = (1 - lr * hyper["weight_decay"]) * theta
    return {"theta": kept - lr * tall * direction, "mean": mean}


RULES = tuple(
    (
        Rule(
            name, partial(step, nesterov=nesterov), STATE, WEIGHTS, HYPER, OPTIMIZERS["muon"].powers
        ),
    )
    for name, nesterov in (("Muon", False), ("Muon with Nesterov", True))
)


def identities() -> Iterator[Identity]:
    for (rule,) in RULES:
        yield from derived(rule)
        general = replace(rule, step=partial(rule.step, orthogonal=anything))  # type: ignore[call-arg]
        yield from general.is_equivariant()
