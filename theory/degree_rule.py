"""Theorem. Let a step be theta - lr D, along a direction D that is homogeneous of degree k in the
gradients and p in the factors. It is equivariant under (theta, g) -> (s theta, g / s) with

    lr' = s**c lr,      c = 1 + k - p,

and, where D is not zero, with no other lr'.

Proof. D(s theta, g / s) = s**(p - k) D(theta, g), so that s theta - lr' s**(p - k) D equals
s (theta - lr D) exactly when lr' s**(p - k) = s lr.                                              []

What the rule remembers counts as what it was made of, a mean of gradients as a gradient. An eps, a
decay or a bound spoils the degree unless it is moved to the size of what it is added to or compared
with. `DEGREES` lists k and p of the optimisers at hand; c is what theory/optimizers derives from
each step on its own.

`identities` takes D = |g|**k |theta|**p f(g / |g|, theta / |theta|) with any k, p and f, which is
what every such D is.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import column, s, without_s

k, p = sp.symbols("k p", real=True)
lr = sp.Symbol("lr", positive=True)
THETA, GRAD = column("theta", 2), column("g", 2)

DEGREES = {
    "sgd": (1, 0),
    "asgd": (1, 0),
    "adadelta": (1, 0),  # former steps count as gradients
    "adam": (0, 0),
    "adamw": (0, 0),
    "adamax": (0, 0),
    "nadam": (0, 0),
    "radam": (0, 0),  # once it rectifies; before, k = 1 and c = 2, that of lr unrectified_lr
    "rmsprop": (0, 0),
    "rprop": (0, 0),
    "adagrad": (0, 0),
    "lion": (0, 0),
    "muon": (0, 0),
    "schedulefree": (0, 0),
    "adamw8bit": (0, 0),
    "adafactor": (0, 1),  # steps are relative to the size of theta
    "prodigy": (0, 1),  # to the distance that theta has come
}


def direction(theta: sp.Matrix, grad: sp.Matrix) -> sp.Matrix:
    lengths = [sp.sqrt(sum(x**2 for x in vector)) for vector in (grad, theta)]
    units = [*(grad / lengths[0]), *(theta / lengths[1])]
    size = lengths[0] ** k * lengths[1] ** p
    return sp.Matrix([size * sp.Function(f"f_{i}", real=True)(*units) for i in (1, 2)])


def difference(c: sp.Expr) -> sp.Matrix:
    """(theta' - lr' D') - s (theta - lr D) with lr' = s**c lr"""
    moved = s * THETA - s**c * lr * direction(s * THETA, GRAD / s)
    left = []
    for there, here in zip(moved, THETA - lr * direction(THETA, GRAD), strict=True):
        power, rest = without_s(there)
        left.append(s**power * rest - s * here)
    return sp.Matrix(left)


def identities() -> Iterator[Identity]:
    yield Identity("c = 1 + k - p: theta' - lr' D' = s (theta - lr D)", difference(1 + k - p))
    for kind, (in_grad, in_theta) in DEGREES.items():
        c = OPTIMIZERS[kind].powers.get("lr", 0)
        claim = f"{kind}: k = {in_grad}, p = {in_theta}, c = {c}, as claimed"
        yield Identity(claim, sp.Integer(c - (1 + in_grad - in_theta)))
