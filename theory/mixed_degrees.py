"""Theorem. Let a model have layers of degrees m_1, ..., m_L, all with the same gamma > 0.

(i)  One s for all layers folds gamma away only if gamma = 1 or all degrees are equal.
(ii) s_l = gamma**(1 / m_l) in layer l always does, with the start and the settings of its factors
     moved by powers of s_l.

Proof. (i) In layer l gamma T(A) = T(s A) = s**m_l T(A), so s**m_l = gamma for every l. If m and m'
are two of the degrees, s**m = s**m' with s > 0, so s = 1 or m = m'; and s = 1 gives gamma = 1.
(ii) Each layer's factors are moved as the theorem on gamma says; the update of one layer is
unchanged, so the gradients of the others see no difference (theory/induction.py holds for factors
of any layer at once, as the induction is over all of them together).                          []

LoKr is the case in point: its right block is factored where a rank saves something and kept full
elsewhere, so one configuration has degree 3 in some layers and 2 in others. A run is then rewritten
layer by layer. What couples layers by one number needs one s nevertheless: clipping by the norm of
all gradients (theory/gradient_clipping.py), and optimizers that say `one_scale`.

By theory/gauge.py the mixed model also has a single learning rate again, if the whole of gamma goes
to one factor in every layer: then s is gamma in each, whatever the degrees.
"""

from collections.abc import Iterator

import sympy as sp

from theory import Check, Counterexample, Identity
from theory.homogeneity import LOKR, Update

gamma, s = sp.symbols("gamma s", positive=True)
FULL, FACTORED = LOKR[0], LOKR[1]


def one_scale(degrees: tuple[int, ...]) -> list[dict[sp.Symbol, sp.Expr]]:
    """The s and gamma with s**m = gamma for every degree m."""
    return list(sp.solve([s**m - gamma for m in degrees], [s, gamma], dict=True))


def left(update: Update, gamma: sp.Expr, scale: sp.Expr) -> sp.Matrix:
    """gamma T(A) - T(scale A)."""
    factors = update.factors()
    moved = update.scaled(factors, dict.fromkeys(factors, scale))
    return gamma * update.of(factors) - update.of(moved)


def identities() -> Iterator[Check]:
    degrees = FULL.degree, FACTORED.degree
    (solution,) = one_scale(degrees)
    yield Identity(f"degrees {degrees}: one s only at gamma = 1", solution[gamma] - 1)
    yield Identity(f"degrees {degrees}: and then s = 1", solution[s] - 1)
    for update in (FULL, FACTORED):
        own = gamma ** sp.Rational(1, update.degree)
        claim = f"{update.name}: gamma T(A) = T(s A), s = {own}"
        yield Identity(claim, left(update, gamma, own))

    # gamma = 1/64: s = 1/8 for degree 2, s = 1/4 for degree 3.
    for update, of_the_other in ((FULL, sp.Rational(1, 4)), (FACTORED, sp.Rational(1, 8))):
        entry = left(update, sp.Rational(1, 64), of_the_other)[0]
        at_one = entry.subs(dict.fromkeys(entry.free_symbols, 1))
        yield Counterexample(f"{update.name}: with s = {of_the_other}, of the other", at_one)
