"""Theorem. The T of each additive adapter W' = W + gamma * T(A_1, ..., A_n) is homogeneous,

    T(a A_1, ..., a A_n) = a**m T(A_1, ..., A_n)      for every real a,   with m as follows:

    LoRA    B A                              2
    LoHa    (B1 A1) * (B2 A2)                4      * elementwise
    LoKr    C (x) D, right block full        2      (x) Kronecker
    LoKr    C (x) (B A), right factored      3
    native  D                                1

Proof. Matrix product, elementwise product and Kronecker product are linear in each argument, so
scaling every factor by a multiplies T by a once for every factor that occurs in it.         []

A convolution's weight is unrolled to P x (Q k k), or for LoKr is a Kronecker product at each of the
k k positions; either way the same T acts, so the same degree holds.

`difference` checks the equality entry by entry, from the definitions written below, on factors
whose entries are all symbols. The numerical check runs on the adapters that train, at random
shapes and ranks: tests/theory/test_homogeneity.py compares each with its definition here, and
tests/test_gamma.py checks the degree that each claims for a layer.

Shapes: P outputs, Q inputs, R rank; LoKr splits P = U V and Q = S T, C is U x S.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import sympy as sp

from theory import Identity

P, Q, R = 2, 3, 2
U, V, S, T = 2, 2, 2, 3  # LoKr only


@dataclass(frozen=True)
class Additive:
    """An update T, the shapes of its factors and the degree that is claimed for it."""

    name: str
    shapes: Mapping[str, tuple[int, int]]
    transform: Callable[..., sp.Matrix]
    degree: int

    def factors(self) -> dict[str, sp.Matrix]:
        """One real symbol for every entry of every factor."""
        return {
            name: sp.Matrix(
                rows,
                columns,
                lambda i, j, name=name: sp.Symbol(f"{name}_{i}{j}", real=True),
            )
            for name, (rows, columns) in self.shapes.items()
        }


def product(B: sp.Matrix, A: sp.Matrix) -> sp.Matrix:
    return sp.Matrix(B.rows, A.cols, lambda p, q: sum(B[p, r] * A[r, q] for r in range(A.rows)))


def hadamard(left: sp.Matrix, right: sp.Matrix) -> sp.Matrix:
    return sp.Matrix(left.rows, left.cols, lambda p, q: left[p, q] * right[p, q])


def kronecker(left: sp.Matrix, right: sp.Matrix) -> sp.Matrix:
    v, y = right.shape
    return sp.Matrix(
        left.rows * v,
        left.cols * y,
        lambda p, q: left[p // v, q // y] * right[p % v, q % y],
    )


def lora(B: sp.Matrix, A: sp.Matrix) -> sp.Matrix:
    return product(B, A)


def loha(B1: sp.Matrix, A1: sp.Matrix, B2: sp.Matrix, A2: sp.Matrix) -> sp.Matrix:
    return hadamard(product(B1, A1), product(B2, A2))


def lokr_full(C: sp.Matrix, D: sp.Matrix) -> sp.Matrix:
    return kronecker(C, D)


def lokr_factored(C: sp.Matrix, B: sp.Matrix, A: sp.Matrix) -> sp.Matrix:
    return kronecker(C, product(B, A))


def native(D: sp.Matrix) -> sp.Matrix:
    return D


_BA = {"B": (P, R), "A": (R, Q)}

TRANSFORMS = (
    Additive("LoRA", _BA, lora, 2),
    Additive("LoHa", {"B1": (P, R), "A1": (R, Q), "B2": (P, R), "A2": (R, Q)}, loha, 4),
    Additive("LoKr, right block full", {"C": (U, S), "D": (V, T)}, lokr_full, 2),
    Additive(
        "LoKr, right block factored", {"C": (U, S), "B": (V, R), "A": (R, T)}, lokr_factored, 3
    ),
    Additive("native", {"D": (P, Q)}, native, 1),
)


def difference(adapter: Additive, degree: int) -> sp.Matrix:
    """T(a A) - a**degree T(A)."""
    a = sp.Symbol("a", real=True)
    factors = adapter.factors()
    scaled = {name: a * factor for name, factor in factors.items()}
    return adapter.transform(**scaled) - a**degree * adapter.transform(**factors)


def identities() -> Iterator[Identity]:
    for adapter in TRANSFORMS:
        claim = f"{adapter.name}: T(a A) = a**{adapter.degree} T(A)"
        yield Identity(claim, difference(adapter, adapter.degree))
