"""Clipping: torch's formula, and the two conditions that are easily missed."""

import pytest
import sympy as sp
import torch

from theory import is_zero
from theory.gradient_clipping import GRADIENT, c, coefficient, delta, difference, s


@pytest.mark.parametrize(("moved_c", "moved_delta"), [(c, delta / s), (c * s, delta / s)])
def test_a_wrong_exponent_is_caught(moved_c, moved_delta):
    assert is_zero(difference(c / s, delta / s))
    assert not is_zero(difference(moved_c, moved_delta))


def test_leaving_torchs_delta_alone_is_caught_and_vanishes_with_it():
    left = difference(c / s, delta)
    assert not is_zero(left)
    assert is_zero(left.subs(delta, 0))


def test_two_scales_under_one_norm_are_caught():
    """Layers of different degrees have different s, and clipping mixes their gradients."""
    moved = sp.Matrix([GRADIENT[0] / s, *(g / s**2 for g in GRADIENT[1:])])
    left = coefficient(moved.norm(), c / s, 0) - coefficient(GRADIENT.norm(), c, 0)
    assert not is_zero(left)


def test_the_coefficient_is_that_of_torch():
    parameter = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    grad = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    parameter.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_([parameter], max_norm=2.0)
    torch.testing.assert_close(parameter.grad, coefficient(13.0, 2.0, 1e-6) * grad)
