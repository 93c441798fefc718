"""Theorem. Clipping the gradient g to norm c,

    clip(g; c, delta) = min(1, c / (|g| + delta)) g,

is equivariant under g -> g / s with c' = c / s and delta' = delta / s, and with no other choice.

Proof. That c' / (|g| / s + delta') = c / (|g| + delta) for every |g| is an equation between
polynomials in |g|, whose coefficients give c' = c / s and delta' = delta / s. With these the
coefficient of g is the same on both sides, clipped or not, and g carries its 1 / s.           []

Two conditions are easily missed. The norm runs over all factors, so all of them must share one s.
And torch.nn.utils.clip_grad_norm_ has delta = 1e-6, which nobody moves: with it the two runs agree
only to about 1e-6 / |g| wherever the clipping is active.
"""

from collections.abc import Iterator

import sympy as sp

from lyco_lab.gamma import POWERS
from theory import Identity

s, c, delta, norm = sp.symbols("s c delta norm", positive=True)
GRADIENT = sp.Matrix(sp.symbols("g_1:4", real=True))


def coefficient(norm: sp.Expr, c: sp.Expr, delta: sp.Expr) -> sp.Expr:
    """What the gradient is multiplied by, wherever this is below one."""
    return c / (norm + delta)


def solve() -> dict[str, sp.Expr]:
    """c' and delta' for which the coefficient is the same at every norm."""
    moved_c, moved_delta = sp.symbols("c' delta'", positive=True)
    left = coefficient(norm / s, moved_c, moved_delta) - coefficient(norm, c, delta)
    numerator, _ = sp.fraction(sp.together(left))
    equations = sp.Poly(sp.expand(numerator), norm).coeffs()
    (solution,) = sp.solve(equations, [moved_c, moved_delta], dict=True)
    return {"c": solution[moved_c], "delta": solution[moved_delta]}


def difference(moved_c: sp.Expr, moved_delta: sp.Expr) -> sp.Matrix:
    """clip(g / s; c', delta') - clip(g; c, delta) / s where both are clipped, entry by entry."""
    moved = coefficient((GRADIENT / s).norm(), moved_c, moved_delta) * GRADIENT / s
    return moved - coefficient(GRADIENT.norm(), c, delta) * GRADIENT / s


def identities() -> Iterator[Identity]:
    solution = solve()
    for optimizer, powers in POWERS.items():
        claim = f"clipping under {optimizer}: c' = {solution['c']}, as in lyco_lab.gamma"
        yield Identity(claim, solution["c"] - c * s ** powers["grad_clip"])
    yield Identity(
        f"clip(g / s; c / s, {solution['delta']}) = clip(g; c, delta) / s",
        difference(solution["c"], solution["delta"]),
    )
