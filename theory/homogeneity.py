"""Theorem. The change W' - W of each adapter below is gamma times a sum T of terms, each of degree
one in every factor that it names, and all terms name the same number m of factors. So

    T(a_1 A_1, ..., a_n A_n)  =  sum over terms t of  (product of the a_i in t) T_t(A_1, ..., A_n)
    T(a A_1, ..., a A_n)      =  a**m T(A_1, ..., A_n)          for all real a_i and a, with

                                                                                     m
    LoRA, LoCon     B A                                                              2
      Tucker        sum_rs B[p, r] M[r, s, k] A[s, q]                                3
    DyLoRA          sum over the first b of the ranks, for any b                     2
    T-LoRA          P diag(L) Q - P0 diag(L0) Q0, the frozen copy scaled alike       3
    LoHa            (B1 A1) * (B2 A2)                      * elementwise             4
      Tucker        both products through a core                                     6
    LoKr            C (x) D, both blocks full              (x) Kronecker             2
      left          C1 C2 in the place of C                                        + 1
      right         B A in the place of D                                          + 1
      right, Tucker the same through a core                                        + 2
    GLoRA           W A1 A2 + B1 B2                                                  2
    (IA)3           diag(w) W, or W diag(w)                                          1
    native, norm    D                                                                1
    use_scalar      c T(A), c trained                                              + 1

Proof. Products of matrices, elementwise and Kronecker, and the sum over a core's indices are
linear in each argument; W is a constant. So scaling A_i by a_i multiplies each term that names A_i
by a_i, once, and no other term. With all a_i = a every term carries a**m.                     []

Tensors are unrolled here as the adapters unroll them: a weight of Q inputs and K taps is a matrix
with the taps as the fastest index of its columns, and a core of R x R x K one of R x (R K).

`by_factor` and `difference` check the two equalities entry by entry, with a symbol for every entry
of every factor, and one for every a_i. tests/theory/test_homogeneity.py compares the definitions
below, and the terms, with the adapters that train. What has no degree: theory/dora.py,
theory/rotations.py.

Shapes: P outputs, Q inputs, K taps, R rank; LoKr splits P = U V and Q = S T.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import sympy as sp

from theory import Identity

P, Q, R, K = 2, 3, 2, 2
U, V, S, T = 2, 2, 2, 3  # LoKr only

Sizes = Mapping[str, tuple[int, int]]
Scales = Mapping[str, sp.Expr]
Terms = tuple[tuple[str, ...], ...]


def entries(name: str, rows: int, columns: int) -> sp.Matrix:
    """A matrix with a real symbol for each entry."""
    return sp.Matrix(rows, columns, lambda i, j: sp.Symbol(f"{name}_{i}{j}", real=True))


@dataclass(frozen=True)
class Update:
    """A change T in front of which gamma stands, and what is claimed of it."""

    name: str
    shapes: Sizes  # of the factors
    transform: Callable[..., sp.Matrix]
    terms: Terms  # the factors of each
    frozen: Sizes = field(default_factory=dict)  # what T also reads, and nobody scales

    @property
    def degree(self) -> int:
        (m,) = {len(term) for term in self.terms}
        return m

    def factors(self) -> dict[str, sp.Matrix]:
        return {name: entries(name, *shape) for name, shape in self.shapes.items()}

    def of(self, factors: Mapping[str, sp.Matrix]) -> sp.Matrix:
        """T at these factors."""
        constants = {name: entries(name, *shape) for name, shape in self.frozen.items()}
        return self.transform(**factors, **constants)

    def scaled(self, factors: Mapping[str, sp.Matrix], scales: Scales) -> dict[str, sp.Matrix]:
        return {name: scales[name] * factor for name, factor in factors.items()}

    def term(self, which: int, factors: Mapping[str, sp.Matrix]) -> sp.Matrix:
        """One of the terms, no two of which share a factor: T with the others' factors at zero."""
        named = self.terms[which]
        return self.of({k: A if k in named else 0 * A for k, A in factors.items()})


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


def through_core(M: sp.Matrix, A: sp.Matrix) -> sp.Matrix:
    """sum_s M[r, s, k] A[s, q] as a matrix of R x (Q K)."""
    taps = M.cols // A.rows
    return sp.Matrix(
        M.rows,
        A.cols * taps,
        lambda r, j: sum(M[r, s * taps + j % taps] * A[s, j // taps] for s in range(A.rows)),
    )


def prefix(b: int) -> Callable[..., sp.Matrix]:
    """B A with the first b ranks alone."""
    return lambda B, A: product(B[:, :b], A[:b, :])


def lora(B: sp.Matrix, A: sp.Matrix) -> sp.Matrix:
    return product(B, A)


def tucker(B: sp.Matrix, M: sp.Matrix, A: sp.Matrix) -> sp.Matrix:
    return product(B, through_core(M, A))


def tlora(
    P: sp.Matrix, L: sp.Matrix, Q: sp.Matrix, P0: sp.Matrix, L0: sp.Matrix, Q0: sp.Matrix
) -> sp.Matrix:
    def singular(left: sp.Matrix, values: sp.Matrix, right: sp.Matrix) -> sp.Matrix:
        return product(left, sp.Matrix(*right.shape, lambda r, q: values[r] * right[r, q]))

    return singular(P, L, Q) - singular(P0, L0, Q0)


def loha(B1: sp.Matrix, A1: sp.Matrix, B2: sp.Matrix, A2: sp.Matrix) -> sp.Matrix:
    return hadamard(product(B1, A1), product(B2, A2))


def loha_tucker(
    B1: sp.Matrix, M1: sp.Matrix, A1: sp.Matrix, B2: sp.Matrix, M2: sp.Matrix, A2: sp.Matrix
) -> sp.Matrix:
    return hadamard(tucker(B1, M1, A1), tucker(B2, M2, A2))


def lokr(**blocks: sp.Matrix) -> sp.Matrix:
    left = blocks["C"] if "C" in blocks else product(blocks["C1"], blocks["C2"])
    if "D" in blocks:
        return kronecker(left, blocks["D"])
    inner = through_core(blocks["M"], blocks["A"]) if "M" in blocks else blocks["A"]
    return kronecker(left, product(blocks["B"], inner))


def glora(A1: sp.Matrix, A2: sp.Matrix, B1: sp.Matrix, B2: sp.Matrix, W: sp.Matrix) -> sp.Matrix:
    """A1 A2 mixes the input channels of W, each tap alike."""
    taps = W.cols // A1.rows
    mixed = kronecker(product(A1, A2), sp.eye(taps))
    return product(W, mixed) + product(B1, B2)


def ia3(w: sp.Matrix, W: sp.Matrix) -> sp.Matrix:
    return sp.Matrix(*W.shape, lambda p, q: w[p] * W[p, q])


def ia3_on_input(w: sp.Matrix, W: sp.Matrix) -> sp.Matrix:
    taps = W.cols // w.rows
    return sp.Matrix(*W.shape, lambda p, q: W[p, q] * w[q // taps])


def native(D: sp.Matrix) -> sp.Matrix:
    return D


def with_scalar(update: Update) -> Update:
    """c T(A): what `use_scalar` makes of an update."""

    def transform(c: sp.Matrix, **rest: sp.Matrix) -> sp.Matrix:
        return c[0] * update.transform(**rest)

    terms = tuple(("c", *term) for term in update.terms)
    shapes = {"c": (1, 1), **update.shapes}
    return Update(f"{update.name}, with a scalar", shapes, transform, terms, update.frozen)


def _product(name: str, shapes: Sizes, transform: Callable[..., sp.Matrix]) -> Update:
    """An update that is a single term."""
    return Update(name, shapes, transform, (tuple(shapes),))


def _lokr() -> Iterator[Update]:
    left = {"full": {"C": (U, S)}, "factored": {"C1": (U, R), "C2": (R, S)}}
    right = {
        "full": {"D": (V, T)},
        "factored": {"B": (V, R), "A": (R, T)},
        "with a core": {"B": (V, R), "M": (R, R * K), "A": (R, T)},
    }
    for l_name, l_shapes in left.items():
        for r_name, r_shapes in right.items():
            yield _product(f"LoKr, left {l_name}, right {r_name}", {**l_shapes, **r_shapes}, lokr)


_BA = {"B": (P, R), "A": (R, Q)}
_CORE = {"B": (P, R), "M": (R, R * K), "A": (R, Q)}

LORA = _product("LoRA", _BA, lora)
TUCKER = _product("LoRA, Tucker", _CORE, tucker)
DYLORA = tuple(_product(f"DyLoRA, first {b} of {R}", _BA, prefix(b)) for b in range(1, R + 1))
TLORA = Update(
    "T-LoRA",
    {"P": (P, R), "L": (R, 1), "Q": (R, Q), "P0": (P, R), "L0": (R, 1), "Q0": (R, Q)},
    tlora,
    (("P", "L", "Q"), ("P0", "L0", "Q0")),
)
LOHA = _product("LoHa", {f"{k}{i}": _BA[k] for i in "12" for k in _BA}, loha)
LOHA_TUCKER = _product(
    "LoHa, Tucker", {f"{k}{i}": _CORE[k] for i in "12" for k in _CORE}, loha_tucker
)
LOKR = tuple(_lokr())
GLORA = Update(
    "GLoRA",
    {"A1": (Q, R), "A2": (R, Q), "B1": (P, R), "B2": (R, Q * K)},
    glora,
    (("A1", "A2"), ("B1", "B2")),
    {"W": (P, Q * K)},
)
IA3 = Update("(IA)3", {"w": (P, 1)}, ia3, (("w",),), {"W": (P, Q * K)})
IA3_ON_INPUT = Update("(IA)3, on input", {"w": (Q, 1)}, ia3_on_input, (("w",),), {"W": (P, Q * K)})
NATIVE = _product("native", {"D": (P, Q)}, native)
NORM = _product("norm", {"D": (P, 1)}, native)
SCALARS = (with_scalar(LORA), with_scalar(LOHA), with_scalar(LOKR[1]))

UPDATES = (
    LORA,
    TUCKER,
    *DYLORA,
    TLORA,
    LOHA,
    LOHA_TUCKER,
    *LOKR,
    GLORA,
    IA3,
    IA3_ON_INPUT,
    NATIVE,
    NORM,
    *SCALARS,
)


def by_factor(update: Update, terms: Terms) -> sp.Matrix:
    """T(a_1 A_1, ...) minus the sum over terms of (product of the a_i in it) T_t(A)."""
    factors = update.factors()
    scales = {name: sp.Symbol(f"a_{name}", real=True) for name in factors}
    left = update.of(update.scaled(factors, scales))
    for i, term in enumerate(terms):
        left -= sp.prod(scales[name] for name in term) * update.term(i, factors)
    return left


def difference(update: Update, degree: int) -> sp.Matrix:
    """T(a A) - a**degree T(A)."""
    factors, a = update.factors(), sp.Symbol("a", real=True)
    scaled = update.scaled(factors, dict.fromkeys(factors, a))
    return update.of(scaled) - a**degree * update.of(factors)


def identities() -> Iterator[Identity]:
    for update in UPDATES:
        named = " + ".join(" ".join(term) for term in update.terms)
        yield Identity(
            f"{update.name}: degree 1 in each of {named}", by_factor(update, update.terms)
        )
        claim = f"{update.name}: T(a A) = a**{update.degree} T(A)"
        yield Identity(claim, difference(update, update.degree))
