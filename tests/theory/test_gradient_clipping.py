"""Clipping: torch's formula, and the conditions that are easily missed."""

import pytest
import sympy as sp
import torch

from theory import is_zero
from theory.gradient_clipping import (
    GRADIENT,
    SCALES,
    WEIGHTS,
    asked,
    bounded,
    c,
    coefficient,
    delta,
    difference,
    s,
    weighted,
)

ONE = s * sp.ones(3, 1)
MOVED = WEIGHTS.multiply_elementwise(SCALES)


@pytest.mark.parametrize(("moved_c", "moved_delta"), [(c, delta / s), (c * s, delta / s)])
def test_a_wrong_exponent_is_caught(moved_c, moved_delta):
    assert is_zero(difference(c / s, delta / s, ONE, WEIGHTS))
    assert not is_zero(difference(moved_c, moved_delta, ONE, WEIGHTS))


def test_leaving_torchs_delta_alone_is_caught_and_vanishes_with_it():
    left = difference(c / s, delta, ONE, WEIGHTS)
    assert not is_zero(left)
    assert is_zero(left.subs(delta, 0))


@pytest.mark.parametrize(
    "weights", [WEIGHTS, WEIGHTS.multiply_elementwise(SCALES.applyfunc(lambda x: x**2))]
)
def test_two_scales_under_one_norm_need_moved_weights(weights):
    assert is_zero(difference(c, delta, SCALES, MOVED))
    assert not is_zero(difference(c, delta, SCALES, weights))


def test_with_one_scale_every_gradient_asks_for_the_same_threshold():
    gradients = [sp.Matrix([1, 0, 0]), sp.Matrix([0, 1, 0]), sp.Matrix([2, 3, 6])]
    assert {asked(grad, ONE) for grad in gradients} == {1 / s}
    assert len({asked(grad, sp.Matrix([2, 3, 3])) for grad in gradients}) == 3


def test_the_coefficient_is_that_of_torch():
    parameter = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    grad = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    parameter.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_([parameter], max_norm=2.0)
    norm = weighted(sp.Matrix(grad.tolist()), sp.ones(3, 1))
    torch.testing.assert_close(parameter.grad, float(coefficient(norm, 2.0, 1e-6)) * grad)


@pytest.mark.parametrize("value", [-3.0, -0.2, 0.0, 0.7, 5.0])
def test_the_bound_on_entries_is_that_of_torch(value):
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.tensor([value], dtype=torch.float64)
    torch.nn.utils.clip_grad_value_([parameter], clip_value=0.5)
    assert parameter.grad.item() == float(bounded(sp.Float(value), sp.Float(0.5)))
    assert not is_zero(bounded(GRADIENT[0] / s, c) - bounded(GRADIENT[0], c) / s)
