"""LoRA against its definition, its start, and its form as two convolutions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from lyco_lab.adapters.lora import LoRA
from tests.strategies import alphas, random_factors, random_weight, ranks, seeds


def lora_naive(w_PQ, f, scale):
    """The definition, one entry at a time."""
    out_PQ = w_PQ.clone()
    for p in range(w_PQ.shape[0]):
        for q in range(w_PQ.shape[1]):
            for r in range(f["b_PR"].shape[1]):
                out_PQ[p, q] += scale * f["b_PR"][p, r] * f["a_RQ"][r, q]
    return out_PQ


@given(rank=ranks, alpha=alphas, seed=seeds)
def test_matches_the_definition(rank, alpha, seed):
    adapter, w_PQ = LoRA(rank=rank, alpha=alpha), random_weight((5, 7), seed)
    factors = random_factors(adapter, w_PQ, seed)
    naive = lora_naive(w_PQ, factors, scale=alpha / rank)
    torch.testing.assert_close(adapter.adapted(w_PQ, factors), naive)


@given(rank=ranks, alpha=alphas, seed=seeds)
def test_on_a_convolution_it_is_two(rank, alpha, seed):
    """The layer's own kernel down to R channels, then one tap up: the paper's appendix B.2."""
    adapter, weight = LoRA(rank=rank, alpha=alpha), random_weight((6, 4, 3, 2), seed)
    factors = random_factors(adapter, weight, seed)
    x = random_weight((2, 4, 7, 8), seed + 1)
    down = F.conv2d(x, factors["a_RQ"], stride=2, padding=1)
    up = F.conv2d(down, factors["b_PR"][:, :, None, None])
    change = F.conv2d(x, adapter.delta(weight, factors), stride=2, padding=1)
    torch.testing.assert_close(change, alpha / rank * up)


def test_kernels_take_their_own_rank_and_alpha():
    adapter = LoRA(rank=4, alpha=2.0, conv_rank=2, conv_alpha=3.0)
    assert adapter.num_params((8, 12, 3, 3)) == 2 * (8 + 12 * 9)
    assert adapter.gamma((8, 12, 3, 3)) == 1.5
    for linear in ((8, 12), (8, 12, 1, 1)):  # one tap is a linear layer
        assert adapter.num_params(linear) == 4 * (8 + 12)
        assert adapter.gamma(linear) == 0.5


@pytest.mark.parametrize("shape", [(64, 100), (64, 11, 3, 3)])
def test_starts_as_the_paper_says(shape):
    start = LoRA(rank=50).init(torch.empty(shape), torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    assert not start["b_PR"].any()
    assert 0.99 * bound < start["a_RQ"].abs().max() <= bound
    torch.testing.assert_close(start["a_RQ"].std().item(), bound / math.sqrt(3), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "LoRA needs rank to be a whole number >= 1, got 0"),
        ({"rank": -3}, "got -3"),
        ({"rank": 2.5}, "got 2.5"),
        ({"conv_rank": 0}, "conv_rank"),
        ({"alpha": math.nan}, "alpha to be a finite number > 0.*got nan"),
        ({"alpha": math.inf}, "got inf"),
        ({"alpha": 0.0}, "alpha = rank leaves T unscaled, got 0.0"),
        ({"conv_alpha": -1.0}, "conv_alpha"),
    ],
)
def test_refuses_what_cannot_scale(fields, words):
    with pytest.raises(ValueError, match=words):
        LoRA(**fields)
