"""LoHa against its definition, its start, and the rank it reaches."""

import pytest
import torch
from hypothesis import given

from lyco_lab.adapters.loha import LoHa
from tests.strategies import alphas, random_factors, random_weight, ranks, seeds


def loha_naive(w_PQ, f, scale):
    """The definition, one entry at a time."""
    out_PQ = w_PQ.clone()
    for p in range(w_PQ.shape[0]):
        for q in range(w_PQ.shape[1]):
            left = sum(b * a for b, a in zip(f["b1_PR"][p], f["a1_RQ"][:, q], strict=True))
            right = sum(b * a for b, a in zip(f["b2_PR"][p], f["a2_RQ"][:, q], strict=True))
            out_PQ[p, q] += scale * left * right
    return out_PQ


@given(rank=ranks, alpha=alphas, seed=seeds)
def test_matches_the_definition(rank, alpha, seed):
    adapter, w_PQ = LoHa(rank=rank, alpha=alpha), random_weight((5, 7), seed)
    factors = random_factors(adapter, w_PQ, seed)
    naive = loha_naive(w_PQ, factors, scale=alpha / rank)
    torch.testing.assert_close(adapter.adapted(w_PQ, factors), naive)


@given(rank=ranks, alpha=alphas, seed=seeds)
def test_a_convolution_is_unrolled(rank, alpha, seed):
    adapter, weight = LoHa(rank=rank, alpha=alpha), random_weight((5, 2, 2, 3), seed)
    factors = random_factors(adapter, weight, seed)
    naive = loha_naive(weight.flatten(1), factors, scale=alpha / rank)
    torch.testing.assert_close(adapter.adapted(weight, factors).flatten(1), naive)


@given(rank=ranks, seed=seeds)
def test_generic_factors_attain_the_squared_rank(rank, seed):
    adapter, w_PQ = LoHa(rank=rank), random_weight((20, 24), seed)
    delta_PQ = adapter.delta(w_PQ, random_factors(adapter, w_PQ, seed))
    assert torch.linalg.matrix_rank(delta_PQ, rtol=1e-9) == adapter.max_rank((20, 24)) == rank**2


def test_starts_as_the_paper_says():
    start = LoHa(rank=50).init(torch.empty(64, 11, 3, 3), torch.Generator().manual_seed(0))
    assert not start["b2_PR"].any()
    for name, std in {"b1_PR": 0.1, "a1_RQ": 1.0, "a2_RQ": 1.0}.items():
        torch.testing.assert_close(start[name].std().item(), std, rtol=0.05, atol=0)


@pytest.mark.parametrize("fields", [{"rank": 0}, {"alpha": float("inf")}])
def test_refuses_what_cannot_scale(fields):
    with pytest.raises(ValueError, match="LoHa needs"):
        LoHa(**fields)
