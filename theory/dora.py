"""Theorem. DoRA trains W' = m * V / |V| with V = W + gamma T(A), |V| the length of each row.

(i)   gamma is folded away as without the magnitude: with s_i for the factors A_i, the product over
      each term gamma, and s = 1 for m, W' is the same, the gradient of A_i is 1/s_i times and that
      of m is unchanged. So m's start, learning rate and all its settings stay.
(ii)  W' - W is homogeneous of no degree, in A alone or in A and m together.

Proof. (i) W' and hence the loss depend on A through V alone, and V through gamma T(A) alone: they
are a function F(gamma T(A), m). theory/gradient_identity.py asks nothing of the function beside
differentiability, so it holds for A with m fixed; and dF/dm is taken at the same V and m. The same
goes for any map of gamma T(A) and other parameters: the theorem on gamma needs nothing of the
model outside gamma T, and other parameters are a group of their own with s = 1.
(ii) If W'(c A) - W = c**d (W'(A) - W) for some d, the two are parallel. They are not, at the
numbers below, for A alone and for A and m; the determinant of the two is shown.               []

With `detached`, where the gradient takes |V| as constant, (i) holds alike: the constant is the same
number in both runs. What mixes the gradients of m with those of A needs s = 1 for both, as does
clipping by the norm of all of them (theory/gradient_clipping.py).
"""

from collections.abc import Iterator

import sympy as sp

from theory import Check, Counterexample, Identity
from theory.homogeneity import entries, product

P, Q = 1, 2  # one row is enough: rows are independent
s = {name: sp.Symbol(f"s_{name}", positive=True) for name in "BA"}
gamma = s["B"] * s["A"]

W = entries("W", P, Q)
B, A = entries("B", P, 1), entries("A", 1, Q)
m = sp.Symbol("m", positive=True)
n = sp.Symbol("n", positive=True)  # |V|, where it is taken as constant


def adapted(m: sp.Expr, V: sp.Matrix, norm: sp.Expr | None = None) -> sp.Matrix:
    """One row of W'."""
    return m * V / (sp.sqrt(sum(v**2 for v in V)) if norm is None else norm)


def gradients(gamma: sp.Expr, norm: sp.Expr | None) -> dict[sp.Symbol, sp.Expr]:
    """Of m and every entry of B and A, on a loss with gradient G by W'."""
    G = entries("G", P, Q)
    pairing = (G * adapted(m, W + gamma * product(B, A), norm).T)[0]
    return {symbol: sp.diff(pairing, symbol) for symbol in (m, *B, *A)}


def residuals(norm: sp.Expr | None) -> dict[sp.Symbol, sp.Expr]:
    """The gradient with gamma minus s times the one without it, at the scaled factors."""
    scale = {m: sp.Integer(1)} | dict.fromkeys(B, s["B"]) | dict.fromkeys(A, s["A"])
    moved = {symbol: by * symbol for symbol, by in scale.items()}
    here, there = gradients(gamma, norm), gradients(sp.Integer(1), norm)
    return {x: here[x] - scale[x] * there[x].xreplace(moved) for x in scale}


def change(c: int, with_magnitude: bool) -> sp.Matrix:
    """W' - W at c times the factors: native, W = (3, 4), D = (0, -4), and m = 5 = |W|."""
    w, d = sp.Matrix([[3, 4]]), sp.Matrix([[0, -4]])
    return adapted(sp.Integer(5 * c if with_magnitude else 5), w + c * d) - w


def identities() -> Iterator[Check]:
    here = adapted(m, W + gamma * product(B, A))
    there = adapted(m, W + product(s["B"] * B, s["A"] * A))
    yield Identity("DoRA of LoRA: W' is the same", here - there)
    for how, norm in (("", None), (", detached", n)):
        left = residuals(norm)
        yield Identity(f"DoRA of LoRA{how}: the gradient of m is unchanged", left.pop(m))
        claim = f"DoRA of LoRA{how}: those of B and A are 1/s_B and 1/s_A times"
        yield Identity(claim, sp.Matrix(list(left.values())))
    for of, magnitude in (("A", False), ("A and m", True)):
        pair = sp.Matrix.vstack(change(1, magnitude), change(2, magnitude))
        yield Counterexample(f"W' - W is of no degree in {of}", pair.det())
