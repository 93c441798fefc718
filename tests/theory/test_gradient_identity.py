"""The gradient identity fails for a wrong degree, and holds for autograd on what trains."""

import pytest
import sympy as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.adapters import ADAPTERS
from tests.strategies import adapters_on, random_factors, random_weight, seeds, shapes_of
from theory import Counterexample
from theory.gradient_identity import difference, same_update
from theory.homogeneity import UPDATES

s = sp.Symbol("s", positive=True)
small = [update for update in UPDATES if "core" not in update.name and "Tucker" not in update.name]
every_update = pytest.mark.parametrize("update", small, ids=lambda update: update.name)
homogeneous = [name for name, cls in ADAPTERS.items() if not cls.no_degree]


@every_update
@pytest.mark.parametrize("error", [-1, 1])
def test_a_wrong_degree_is_caught(update, error):
    alike = dict.fromkeys(update.shapes, s)
    for left in (same_update, difference):
        (entry, *_) = left(update, s ** (update.degree + error), alike)
        assert Counterexample("", at_numbers(entry)).holds()


def at_numbers(entry):
    """Unlike any other: 1/2, 1/3, 1/5, ... for its symbols."""
    symbols = sorted(entry.free_symbols, key=str)
    return entry.xreplace({x: sp.Rational(1, sp.prime(i + 1)) for i, x in enumerate(symbols)})


@pytest.mark.parametrize("name", homogeneous)
@given(data=st.data(), seed=seeds, log_gamma=st.floats(-4, 4))
def test_autograd_agrees(name, data, seed, log_gamma):
    """On a loss that is not quadratic, for the run with gamma and the one without."""
    cls = ADAPTERS[name]
    shape = data.draw(shapes_of(cls))
    adapter = data.draw(adapters_on(cls, shape))
    weight = random_weight(shape, seed)
    gamma, s_alike = 10**log_gamma, 10 ** (log_gamma / adapter.degree(shape))
    start = {k: A.clone() for k, A in random_factors(adapter, weight, seed + 1).items()}
    # Sizes at which the loss bends and no term drowns the others, whatever gamma is.
    size = float((gamma / adapter.gamma(shape) * adapter.delta(weight, start)).norm())
    gather = size ** (-1 / adapter.degree(shape))

    def gradients(gamma, scale):
        factors = {k: (scale * gather * A).requires_grad_() for k, A in start.items()}
        change = gamma / adapter.gamma(shape) * adapter.delta(weight, factors)
        loss = torch.exp(torch.sin(weight + change)).sum()
        return torch.autograd.grad(loss, list(factors.values()))

    for left, right in zip(gradients(gamma, 1.0), gradients(1.0, s_alike), strict=True):
        tolerance = 1e-12 * float(left.abs().max())
        torch.testing.assert_close(left, s_alike * right, rtol=1e-12, atol=tolerance)
