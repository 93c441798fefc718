"""Theorem. Let T be a sum of terms, each of degree one in every factor that it names, and L any
differentiable function of the update. Let s_i > 0 be scales whose product over each term is gamma.
At A'_i = s_i A_i,

    grad_{A_i} L(gamma T(A))  =  s_i grad_{A'_i} L(T(A'))        for every factor i.

With one s for all factors this asks that s**m = gamma, m the degree of T.

Proof. gamma T(A) = T(A') (i), since scaling multiplies each term by gamma. So both sides
differentiate L at the same update, and see the same gradient G of L. The chain rule through
A_i -> s_i A_i gives the factor s_i:

    d/dA_i <G, gamma T(A)>  =  d/dA_i <G, T(s A)>  =  s_i d/dA'_i <G, T(A')>   at A'. (ii)     []

So the gradient that the run without gamma sees is 1/s_i times the other's, and this is all that an
optimiser's step needs to know (theory/optimizers).

`same_update` is (i) and `difference` is (ii), for every T of theory/homogeneity.py, with a symbol
for each s_i and for each entry of every factor, of W and of G. Nothing is assumed of L: any
network, any loss.
"""

from collections.abc import Iterator

import sympy as sp

from theory import Identity
from theory.homogeneity import UPDATES, Scales, Terms, Update, entries


def scales(terms: Terms) -> tuple[dict[str, sp.Expr], sp.Expr]:
    """A symbol s_i for every factor, and gamma, their product over each term.

    No two terms share a factor, so the last one of each term but the first makes up for the rest.
    """
    s = {name: sp.Symbol(f"s_{name}", positive=True) for term in terms for name in term}
    gamma = sp.prod(s[name] for name in terms[0])
    for *free, last in terms[1:]:
        s[last] = gamma / sp.prod(s[name] for name in free)
    return s, gamma


def same_update(update: Update, gamma: sp.Expr, scales: Scales) -> sp.Matrix:
    """gamma T(A) - T(A')."""
    factors = update.factors()
    return gamma * update.of(factors) - update.of(update.scaled(factors, scales))


def difference(update: Update, gamma: sp.Expr, scales: Scales) -> sp.Matrix:
    """grad_{A_i} <G, gamma T(A)> - s_i grad_{A'_i} <G, T(A')> for all factors, as one column."""
    factors = update.factors()
    change = update.of(factors)
    G = entries("G", *change.shape)
    pairing = sum(G[i] * change[i] for i in range(len(change)))

    scale = {entry: scales[name] for name, factor in factors.items() for entry in factor}
    moved = {entry: scale[entry] * entry for entry in scale}
    column = []
    for entry in scale:
        gradient = sp.diff(pairing, entry)
        there = gradient.xreplace(moved)
        column.append(sp.expand(gamma * gradient - scale[entry] * there))
    return sp.Matrix(column)


def identities() -> Iterator[Identity]:
    for update in UPDATES:
        s, gamma = scales(update.terms)
        claim = f"{update.name}: gamma T(A) = T(A')"
        yield Identity(claim, same_update(update, gamma, s))
        claim = f"{update.name}: grad_A_i L(gamma T(A)) = s_i grad_A'_i L(T(A'))"
        yield Identity(claim, difference(update, gamma, s))
