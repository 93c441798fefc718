"""Degrees that differ: the equation knows when one s will do, and LoKr is such a case."""

import pytest
import torch

from lyco_lab.adapters import ADAPTERS
from tests.strategies import random_factors, random_weight
from theory import is_zero
from theory.mixed_degrees import FACTORED, FULL, gamma, left, one_scale, s


@pytest.mark.parametrize("degrees", [(2, 2), (3, 3, 3)])
def test_equal_degrees_leave_gamma_free(degrees):
    assert one_scale(degrees) == [{gamma: s ** degrees[0]}]


@pytest.mark.parametrize("degrees", [(1, 2), (2, 4), (2, 3, 4)])
def test_degrees_that_differ_do_not(degrees):
    assert one_scale(degrees) == [{gamma: 1, s: 1}]


@pytest.mark.parametrize("update", [FULL, FACTORED], ids=["full", "factored"])
def test_the_degree_of_the_other_layer_is_caught(update):
    assert is_zero(left(update, s**update.degree, s))
    assert not is_zero(left(update, s ** (5 - update.degree), s))


def test_one_configuration_of_lokr_has_both():
    adapter, shapes = ADAPTERS["lokr"](rank=2, factor=4), ((64, 64), (12, 12))
    assert [adapter.degree(shape) for shape in shapes] == [3, 2]
    gamma = 1 / 64
    for shape, own, other in zip(shapes, (1 / 4, 1 / 8), (1 / 8, 1 / 4), strict=True):
        weight = random_weight(shape, 0)
        factors = random_factors(adapter, weight, 1)

        def change(scale, shape=shape, factors=factors):
            return adapter.transform({k: scale * A for k, A in factors.items()}, shape)

        assert torch.equal(gamma * change(1.0), change(own))
        assert not torch.allclose(gamma * change(1.0), change(other))
