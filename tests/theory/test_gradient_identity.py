"""The gradient identity fails for a wrong degree, and holds for autograd on an actual loss."""

import pytest
import torch

from theory import is_zero
from theory.gradient_identity import difference, same_update
from theory.homogeneity import TRANSFORMS


@pytest.mark.parametrize("adapter", TRANSFORMS, ids=lambda adapter: adapter.name)
@pytest.mark.parametrize("error", [-1, 1])
def test_a_wrong_degree_is_caught(adapter, error):
    assert not is_zero(same_update(adapter, adapter.degree + error))
    assert not is_zero(difference(adapter, adapter.degree + error))


def test_autograd_agrees():
    rng = torch.Generator().manual_seed(0)
    gamma, s = 0.09, 0.3
    b_PR, a_RQ = (torch.randn(n, dtype=torch.float64, generator=rng) for n in ((4, 2), (2, 6)))

    def gradients(scale, b_PR, a_RQ):
        factors = [b_PR.clone().requires_grad_(), a_RQ.clone().requires_grad_()]
        loss = torch.exp(torch.sin(scale * factors[0] @ factors[1])).sum()
        return torch.autograd.grad(loss, factors)

    with_gamma = gradients(gamma, b_PR, a_RQ)
    without = gradients(1.0, s * b_PR, s * a_RQ)
    for left, right in zip(with_gamma, without, strict=True):
        torch.testing.assert_close(left, s * right, rtol=1e-12, atol=1e-12)
