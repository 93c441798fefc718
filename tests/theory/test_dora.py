"""DoRA: wrong scales are caught, and the adapter that trains has the gradients of the theorem."""

from dataclasses import replace

import pytest
import sympy as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.dora import MAGNITUDE
from tests.strategies import adapters_on, random_factors, random_weight, seeds
from theory import is_zero
from theory.dora import A, W, adapted, change, m, n, residuals, s


@pytest.mark.parametrize("norm", [None, n], ids=["", "detached"])
def test_a_gamma_that_is_not_the_product_is_caught(norm, monkeypatch):
    assert is_zero(residuals(norm)[m])
    monkeypatch.setitem(s, "A", s["A"] ** 2)
    entry = residuals(norm)[m] if norm is None else residuals(norm)[A[0]]
    at = {x: sp.Rational(1, sp.prime(i + 1)) for i, x in enumerate(entry.free_symbols)}
    assert entry.xreplace(at).evalf() != 0


def test_the_definition_is_the_adapter_that_trains():
    trained = ADAPTERS["dora"](of=ADAPTERS["native"]())
    for c in (1, 2):
        for with_magnitude in (False, True):
            weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
            start = trained.init(weight, torch.Generator())
            assert start[MAGNITUDE].flatten().tolist() == [5.0]
            factors = {
                "diff": torch.tensor([[0.0, -4.0 * c]], dtype=torch.float64),
                MAGNITUDE: (c if with_magnitude else 1) * start[MAGNITUDE],
            }
            expected = torch.tensor(change(c, with_magnitude).tolist(), dtype=torch.float64)
            torch.testing.assert_close(trained.delta(weight, factors), expected)
    assert is_zero(adapted(m, W) - m * W / W.norm())


@given(data=st.data(), seed=seeds, k=st.integers(-8, 8))
def test_the_gradients_scale_in_every_bit(data, seed, k):
    """gamma = 2**k on one factor of each term, the magnitude left as it is."""
    shape = (8, 12)
    trained, weight = data.draw(adapters_on(ADAPTERS["dora"], shape)), random_weight(shape, seed)
    of, g = trained.of, 2.0**k
    with_gamma = replace(trained, of=of.with_gamma(g))
    without = replace(trained, of=of.with_gamma(1.0))
    start = random_factors(trained, weight, seed + 1)
    scales = dict.fromkeys(start, 1.0) | {term[0]: g for term in of.terms(shape)}

    def gradients(adapter, factors):
        leaves = {name: A.clone().requires_grad_() for name, A in factors.items()}
        change = adapter.delta(weight, leaves)
        loss = (weight + change).sin().exp().sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    here = gradients(with_gamma, start)
    there = gradients(without, {name: scales[name] * A for name, A in start.items()})
    for name, left, right in zip(start, here, there, strict=True):
        assert torch.equal(left, scales[name] * right), name
