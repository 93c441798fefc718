"""Theorem. AdamW that keeps m and v in 8 bits is equivariant under (theta, g) -> (s theta, g / s)
as AdamW is (theory/optimizers/adam.py), with

    lr' = s lr,      eps' = eps / s,      wd' = wd / s,      betas kept,

and with no other powers of s.

Proof. Of each block of x (m or v) are kept its largest size a = max |x| and a code for each x / a.
What is read back is a Q(x / a), where Q, the code's meaning, is some function: nothing more need be
known of it. As m scales by 1 / s, so does its a, and x / a and Q(x / a) stay; likewise v, by
1 / s**2. So what is read back scales as x does, and the rest is AdamW's proof.                   []

The identities hold for any Q; the powers are derived with Q(x) = x. Rounding aside, which may put
an x / a on the edge between two codes on either side unless s is a power of two, `step` is what
AdamW8bit of the package bitsandbytes does to factors large enough for 8 bits. Packages differ in Q,
in the size of a block, and in whether a is kept off zero by a constant: that does not scale, and
acts on blocks that are as good as zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity
from theory._equivariance import (
    Rule,
    Values,
    column,
    derived,
    largest,
    symbols,
)

HYPER = symbols("lr eps weight_decay beta1 beta2", positive=True)
STATE = {
    "theta": column("theta", 2),  # one block
    "grad": column("g", 2),
    "mean": column("m", 2),
    "square": column("v", 2, positive=True),
    "steps": sp.Symbol("t", positive=True, integer=True),
}
WEIGHTS = {"theta": 1, "grad": -1, "mean": -1, "square": -2, "steps": 0}
Code = Callable[[sp.Expr], sp.Expr]
Q_MEAN, Q_SQUARE = (sp.Function(f"Q_{name}", real=True) for name in "mv")


def quantised(x: sp.Matrix, code: Code) -> sp.Matrix:
    size = sp.Abs(x[0])
    for entry in x[1:]:
        size = largest(size, sp.Abs(entry))
    return x.applyfunc(lambda entry: size * code(entry / size))


def step(
    state: Values, hyper: Values, code_mean: Code = Q_MEAN, code_square: Code = Q_SQUARE
) -> dict[str, sp.Expr]:
    lr, beta1, beta2, grad = hyper["lr"], hyper["beta1"], hyper["beta2"], state["grad"]
    steps = state["steps"] + 1
    mean = beta1 * state["mean"] + (1 - beta1) * grad
    square = beta2 * state["square"] + (1 - beta2) * grad.applyfunc(lambda g: g**2)
    direction = sp.Matrix(
        [
            m / (1 - beta1**steps) / (sp.sqrt(v / (1 - beta2**steps)) + hyper["eps"])
            for m, v in zip(mean, square, strict=True)
        ]
    )
    return {
        "theta": (1 - lr * hyper["weight_decay"]) * state["theta"] - lr * direction,
        "mean": quantised(mean, code_mean),
        "square": quantised(square, code_square),
        "steps": steps,
    }


RULES = ((Rule("8-bit AdamW", step, STATE, WEIGHTS, HYPER, OPTIMIZERS["adamw8bit"].powers),),)


def identities() -> Iterator[Identity]:
    for (rule,) in RULES:
        same = partial(step, code_mean=lambda x: x, code_square=lambda x: x)
        yield from derived(replace(rule, step=same))
        yield from rule.is_equivariant()
