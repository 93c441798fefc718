"""Theorem. Let T be homogeneous of degree m, gamma > 0, s = gamma**(1/m), and L any differentiable
function of the update. At A' = s A,

    grad_A L(gamma T(A))  =  s grad_A' L(T(A')).

Proof. By homogeneity gamma T(A) = T(s A) = T(A') (i): both sides differentiate L at the same
update, so both see the same gradient G of L. The chain rule through A -> s A gives the factor s:

    d/dA <G, gamma T(A)>  =  d/dA <G, T(s A)>  =  s d/dA' <G, T(A')>   at A' = s A.   (ii)     []

So the gradient that the run without gamma sees is 1/s times the other's, and this is all that an
optimiser's step needs to know (theory/sgd.py, theory/adam.py).

`same_update` is (i) and `difference` is (ii), for every T of theory/homogeneity.py, with a symbol
for each entry of every factor and of G. Nothing is assumed of L: any network, any loss.
"""

from collections.abc import Iterator

import sympy as sp

from theory import Identity
from theory.homogeneity import TRANSFORMS, Additive

s = sp.Symbol("s", positive=True)


def same_update(adapter: Additive, degree: int) -> sp.Matrix:
    """gamma T(A) - T(s A)."""
    factors = adapter.factors()
    moved = {name: s * factor for name, factor in factors.items()}
    return s**degree * adapter.transform(**factors) - adapter.transform(**moved)


def difference(adapter: Additive, degree: int) -> sp.Matrix:
    """grad_A <G, gamma T(A)> - s grad_A' <G, T(A')> at A' = s A, as one column."""
    factors = adapter.factors()
    update = adapter.transform(**factors)
    G = sp.Matrix(*update.shape, lambda p, q: sp.Symbol(f"G_{p}{q}", real=True))
    pairing = sum(G[i] * update[i] for i in range(len(update)))

    entries = [entry for factor in factors.values() for entry in factor]
    gradient = sp.Matrix([sp.diff(pairing, entry) for entry in entries])
    at_moved = gradient.subs({entry: s * entry for entry in entries}, simultaneous=True)
    return s**degree * gradient - s * at_moved


def identities() -> Iterator[Identity]:
    for adapter in TRANSFORMS:
        m = adapter.degree
        yield Identity(f"{adapter.name}: gamma T(A) = T(s A)", same_update(adapter, m))
        claim = f"{adapter.name}: grad_A L(gamma T(A)) = s grad_A' L(T(A'))"
        yield Identity(claim, difference(adapter, m))
