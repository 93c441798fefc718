"""Theorem. OFT and BOFT, W' = R(B) W, with Cayley's rotations

    R = (I + Q)(I - Q)^-1,      Q = B - B^T,          or a product of such, block by block,

have no gamma to fold away:

(i)   R(B) - I is homogeneous of no degree in B, nor is W' - W.
(ii)  W + gamma (R W - W) is R' W for some rotation R' only if gamma is 0 or 1, or R W = W. So no
      factors give it, however scaled.
(iii) The strength sigma that multiplies the blocks gives a rotation R(sigma B) for every sigma. It
      agrees with (ii) to first order in B alone: R(sigma B) - I = 2 sigma Q + O(sigma**2).

Proof. (i) R is orthogonal, so R(c B) - I is bounded in c; c**d (R(B) - I) is not for d > 0 as
c grows, nor for d < 0 as c goes to zero, if R(B) is not I. And d = 0 would make R(c B) constant
in c, while R(0) = I. (ii) With E = R - I, R^T R = I says E + E^T = -E^T E, hence
(I + gamma E)^T (I + gamma E) = I + (gamma**2 - gamma) E^T E. So W' with gamma has
W'^T W' = W^T W + (gamma**2 - gamma) (E W)^T (E W), and W^T W if it is a rotation of W. (iii) Expand
(I - Q)^-1.                                                                                    []

`rescaled` multiplies R by diag(1 + scale), which at scale = 0 is the case above.

A determinant that is not zero shows (i) at once for every d: were R(2 B) - I a multiple of
R(B) - I, any two entries of the one would be as those of the other.

Shapes: OFT has blocks of b x b, BOFT two stages of them on P = 4 outputs with b = 2.
"""

from collections.abc import Callable, Iterator

import sympy as sp

from theory import Check, Counterexample, Identity
from theory.homogeneity import entries

sigma, gamma = sp.symbols("sigma gamma", real=True)
HALF = sp.Rational(1, 2)


def cayley(B: sp.Matrix) -> sp.Matrix:
    """The rotation by one block."""
    Q, one = B - B.T, sp.eye(B.rows)
    return ((one + Q) * (one - Q).inv()).applyfunc(sp.together)


def oft(*blocks: sp.Matrix) -> sp.Matrix:
    return sp.diag(*map(cayley, blocks))


def boft(*blocks: sp.Matrix) -> sp.Matrix:
    """R_2 R_1 of four rows: a stage rotates rows whose numbers differ in one binary digit."""
    first = sp.diag(cayley(blocks[0]), cayley(blocks[1]))
    swap = sp.Matrix(4, 4, lambda i, j: int(j == (i & 1) * 2 + (i >> 1)))  # the digits swapped
    second = swap * sp.diag(cayley(blocks[2]), cayley(blocks[3])) * swap.T
    return second * first


def turned(q: sp.Expr, b: int = 2) -> sp.Matrix:
    """A block with q, q / 2, q / 3, ... above its diagonal."""
    return sp.Matrix(b, b, lambda i, j: q / (i + j) if j > i else 0)


ROTATIONS: dict[str, Callable[[sp.Expr], sp.Matrix]] = {
    "OFT, b = 2": lambda q: oft(turned(q)),
    "OFT, b = 3": lambda q: oft(turned(q, 3)),
    "BOFT": lambda q: boft(*(turned(q / n) for n in range(1, 5))),
}


def offset(rotation: Callable[[sp.Expr], sp.Matrix], q: sp.Expr) -> sp.Matrix:
    R = rotation(q)
    return R - sp.eye(R.rows)


def identities() -> Iterator[Check]:
    B = entries("B", 2, 2)
    R = cayley(B)
    yield Identity("R is orthogonal", R.T * R - sp.eye(2))
    E = R - sp.eye(2)
    mixed = sp.eye(2) + gamma * E
    yield Identity(
        "I + gamma (R - I) is off by (gamma**2 - gamma) (R - I)^T (R - I)",
        mixed.T * mixed - sp.eye(2) - (gamma**2 - gamma) * E.T * E,
    )
    strong = cayley(sigma * B)
    yield Identity("R(sigma B) is orthogonal for every sigma", strong.T * strong - sp.eye(2))
    first = sp.diff(strong, sigma).subs(sigma, 0)
    yield Identity("R(sigma B) - I = 2 sigma Q + ...", first - 2 * (B - B.T))

    for name, rotation in ROTATIONS.items():
        one, two = offset(rotation, HALF), offset(rotation, 2 * HALF)
        for m in range(7):
            claim = f"{name}: R(2 B) - I is not 2**{m} (R(B) - I)"
            yield Counterexample(claim, two - 2**m * one)
        claim = f"{name}: nor any multiple of it"
        yield Counterexample(claim, one[0, 0] * two[0, 1] - one[0, 1] * two[0, 0])
        half = sp.eye(one.rows) + HALF * one
        claim = f"{name}: half the change, gamma = 1/2, is no rotation"
        yield Counterexample(claim, half.T * half - sp.eye(one.rows))
        claim = f"{name}: nor what a strength of 1/2 makes of the blocks"
        yield Counterexample(claim, offset(rotation, HALF * HALF) - HALF * one)
