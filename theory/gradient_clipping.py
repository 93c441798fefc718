"""Theorem. Clipping the gradients g_i of the factors to a common norm c,

    clip(g; w, c, delta)_i = min(1, c / (|w g| + delta)) g_i,      |w g|**2 = sum_i (w_i |g_i|)**2,

is equivariant under g_i -> g_i / s_i, whatever the s_i are, with weights w_i' = s_i w_i and c and
delta kept. Where all s_i are one s, so it is with the weights kept and

    c' = c / s,      delta' = delta / s,

and with no other choice. Where they are not, no c' will do without weights. Clipping each entry to
[-c, c] is equivariant with c' = c / s, and hence with c_i' = c_i / s_i factor by factor.

Proof. w_i' |g_i / s_i| = w_i |g_i|: the norm is the same, so is min(1, c / (|w g| + delta)), and
g_i carries its 1 / s_i. With one s, multiplying w by s or dividing c and delta by s gives the same
fraction; and that c' / (|g| / s + delta') = c / (|g| + delta) for every |g| is an equation between
polynomials in |g|, whose coefficients leave no other choice. With two, c' / c must be |g'| / |g|,
which depends on how |g| is shared among the factors. A bound on entries scales as they do.       []

torch.nn.utils.clip_grad_norm_ has w = 1 and delta = 1e-6, which nobody moves: with it the two runs
agree only to about 1e-6 / |g| wherever the clipping is active.
"""

from collections.abc import Iterator

import sympy as sp

from theory import Check, Counterexample, Identity
from theory._equivariance import largest, s, smallest, without_s

c, delta, norm = sp.symbols("c delta norm", positive=True)
GRADIENT = sp.Matrix(sp.symbols("g_1:4", real=True))
WEIGHTS = sp.Matrix(sp.symbols("w_1:4", positive=True))
SCALES = sp.Matrix(sp.symbols("s_1:4", positive=True))  # of three factors of one entry each


def coefficient(norm: sp.Expr, c: sp.Expr, delta: sp.Expr) -> sp.Expr:
    """What the gradient is multiplied by, wherever this is below one."""
    return c / (norm + delta)


def weighted(grad: sp.Matrix, weights: sp.Matrix) -> sp.Expr:
    return sp.sqrt(sum((w * g) ** 2 for w, g in zip(weights, grad, strict=True)))


def divided(grad: sp.Matrix, scales: sp.Matrix) -> sp.Matrix:
    return grad.multiply_elementwise(scales.applyfunc(lambda scale: 1 / scale))


def solve() -> dict[str, sp.Expr]:
    """c' and delta' for which the coefficient is the same at every norm, with one s."""
    moved_c, moved_delta = sp.symbols("c' delta'", positive=True)
    left = coefficient(norm / s, moved_c, moved_delta) - coefficient(norm, c, delta)
    numerator, _ = sp.fraction(sp.together(left))
    equations = sp.Poly(sp.expand(numerator), norm).coeffs()
    (solution,) = sp.solve(equations, [moved_c, moved_delta], dict=True)
    return {"c": solution[moved_c], "delta": solution[moved_delta]}


def difference(
    moved_c: sp.Expr, moved_delta: sp.Expr, scales: sp.Matrix, moved_weights: sp.Matrix
) -> sp.Matrix:
    """clip(g'; w', c', delta') - (clip(g; w, c, delta) / s_i)_i where both are clipped."""
    moved = divided(GRADIENT, scales)
    there = coefficient(weighted(moved, moved_weights), moved_c, moved_delta) * moved
    here = coefficient(weighted(GRADIENT, WEIGHTS), c, delta) * GRADIENT
    return there - divided(here, scales)


def asked(grad: sp.Matrix, scales: sp.Matrix) -> sp.Expr:
    """The c' / c that clips this gradient rightly, without weights and delta."""
    one = sp.ones(3, 1)
    return weighted(divided(grad, scales), one) / weighted(grad, one)


def bounded(entry: sp.Expr, c: sp.Expr) -> sp.Expr:
    return smallest(largest(entry, -c), c)


def identities() -> Iterator[Check]:
    weights = WEIGHTS.multiply_elementwise(SCALES)
    yield Identity(
        "clip(g_i / s_i; s_i w_i, c, delta) = clip(g; w, c, delta)_i / s_i",
        difference(c, delta, SCALES, weights),
    )
    solution = solve()
    yield Identity(f"with one s: c' = {solution['c']}", solution["c"] - c / s)
    yield Identity(
        f"with one s: clip(g / s; w, c / s, {solution['delta']}) = clip(g; w, c, delta) / s",
        difference(solution["c"], solution["delta"], s * sp.ones(3, 1), WEIGHTS),
    )
    scales = sp.Matrix([2, 3, 3])
    one, other = sp.Matrix([1, 0, 0]), sp.Matrix([0, 1, 0])
    yield Counterexample(
        "with two s and no weights: two gradients ask for different c'",
        asked(one, scales) - asked(other, scales),
    )
    entry = GRADIENT[0]
    power, rest = without_s(bounded(entry / s, c / s))
    yield Identity(
        "entries: clip(g / s; c / s) = clip(g; c) / s", s**power * rest - bounded(entry, c) / s
    )
