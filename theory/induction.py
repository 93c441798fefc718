"""Theorem (gamma). Let T be homogeneous of degree m and s = gamma**(1/m). Train W + gamma T(A)
from A_0, and W + T(A') from A'_0 = s A_0 with the optimiser's settings moved as it claims
(lyco_lab.optimizers). Then at every step t

    A'_t = s A_t,      hence      T(A'_t) = gamma T(A_t):

the same weight, loss and images, and the same gradient for everything else that is trained.

Proof. By induction on t. At t = 0 it is how A'_0 was chosen, and an optimiser's memory is empty,
that is zero, which any power of s leaves zero. If at step t the factors and the memory of the
second run are the scaled ones of the first, then so are the gradients (theory/gradient_identity.py;
clipped, theory/gradient_clipping.py), and one equivariant step (theory/optimizers) takes scaled
states to scaled states. A schedule multiplies both runs' lr by the same number.  []

`difference` does not use these parts, only the update rules: it trains both runs for two steps in
symbols (the second is the first to meet a memory and a changed gradient) on the smallest adapter
of degree m, T(a_1, ..., a_m) = a_1 ... a_m, with an undefined function f as the derivative of the
loss, positive so that Adam's root of a square resolves. Nothing is assumed about A'_t.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Identity, reduced
from theory._equivariance import Values, s
from theory.optimizers import sgd
from theory.optimizers.adam import HYPER as ADAM_HYPER
from theory.optimizers.adam import adam, adamw

f = sp.Function("f", positive=True)


@dataclass(frozen=True)
class Training:
    """An optimiser with its settings and what it remembers before the first step."""

    name: str
    optimizer: str
    step: Callable[[Values, Values], Values]
    hyper: Values
    memory: Values
    degrees: tuple[int, ...]  # coupled decay inside Adam's root makes higher ones take minutes


_ADAM_MEMORY = {"mean": sp.Integer(0), "square": sp.Integer(0), "steps": sp.Integer(0)}
STEPS = 2
TRAININGS = (
    Training("SGD", "sgd", sgd.step, sgd.HYPER, {}, (1, 2, 3, 4)),
    Training("Adam", "adam", adam, ADAM_HYPER, _ADAM_MEMORY, (1,)),
    Training("AdamW", "adamw", adamw, ADAM_HYPER, _ADAM_MEMORY, (1, 2)),
)


def train(training: Training, gamma: sp.Expr, start: list[sp.Expr], hyper: Values) -> list[sp.Expr]:
    """The factors after `STEPS` steps on a loss L with L' = f of gamma a_1 .. a_m."""
    states: list[dict[str, sp.Expr]] = [{"theta": a, **training.memory} for a in start]
    for _ in range(STEPS):
        factors = [state["theta"] for state in states]
        slope = f(reduced(gamma * sp.prod(factors)))
        for i, state in enumerate(states):
            others = sp.prod(factors[:i] + factors[i + 1 :])
            grad = {"grad": gamma * others * slope}
            states[i] = dict(training.step(state | grad, hyper))
    return [state["theta"] for state in states]


def difference(training: Training, degree: int, powers: Mapping[str, int]) -> sp.Matrix:
    """A'_t - s A_t, with the hyperparameters of the second run moved by `powers` of s."""
    start = list(sp.symbols(f"a_1:{degree + 1}", positive=True))
    moved = {name: value * s ** powers.get(name, 0) for name, value in training.hyper.items()}
    with_gamma = train(training, s**degree, start, training.hyper)
    without = train(training, sp.Integer(1), [s * a for a in start], moved)
    return sp.Matrix([b - s * a for a, b in zip(with_gamma, without, strict=True)])


def identities() -> Iterator[Identity]:
    for training in TRAININGS:
        for degree in training.degrees:
            claim = f"{training.name}, m = {degree}: A'_t = s A_t for t = {STEPS}"
            yield Identity(
                claim, difference(training, degree, OPTIMIZERS[training.optimizer].powers)
            )
