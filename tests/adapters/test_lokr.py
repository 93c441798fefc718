"""LoKr against its definition, its block sizes against the paper's equation 5, its full blocks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.adapters.lokr import LoKr
from lyco_lab.linalg import kron, split
from tests.strategies import alphas, random_factors, random_weight, ranks, seeds


def split_naive(size, factor):
    """u = max{u <= min(factor, sqrt(size)) : size mod u = 0}, as the equation reads."""
    best = 1
    for u in range(1, size + 1):
        if u <= factor and u * u <= size and size % u == 0:
            best = u
    return best, size // best


@given(size=st.integers(1, 2000), factor=st.integers(1, 100))
def test_blocks_follow_the_equation(size, factor):
    assert split(size, factor) == split_naive(size, factor)


def test_blocks_of_stable_diffusion():
    for size in (320, 640, 1280, 2560, 5120, 10240):
        assert split(size, 12) == (10, size // 10)
    for size in (768, 3072):
        assert split(size, 12) == (12, size // 12)


@given(size=st.integers(1, 2000), factor=st.integers(1, 100))
def test_lycoris_differs_only_past_the_root(size, factor):
    from lycoris.functional.general import factorization

    if factor > math.sqrt(size) and size % factor == 0:
        assert factorization(size, factor) == (size // factor, factor)
    else:
        assert factorization(size, factor) == split(size, factor)


def test_a_block_that_differs_from_lycoris():
    from lycoris.functional.general import factorization

    assert factorization(1024, 64) == (16, 64)
    assert split(1024, 64) == (32, 32)


def lokr_naive(weight, c_US, right_VTk, scale):
    """Entry (u V + v, s T + t) of every kernel tap gains c[u, s] d[v, t]."""
    out = weight.clone()
    (U, S), (V, T) = c_US.shape, right_VTk.shape[:2]
    for u in range(U):
        for v in range(V):
            for s in range(S):
                for t in range(T):
                    out[u * V + v, s * T + t] += scale * c_US[u, s] * right_VTk[v, t]
    return out


@pytest.mark.parametrize("shape", [(12, 8), (6, 8, 3), (8, 6, 3, 2)])
@given(factor=st.sampled_from([2, 3, 4]), seed=seeds)
def test_full_blocks_match_the_definition(shape, factor, seed):
    adapter, weight = LoKr(factor=factor), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    naive = lokr_naive(weight, factors["c_US"], factors["d_VT"], scale=1.0)
    torch.testing.assert_close(adapter.adapted(weight, factors), naive)


@pytest.mark.parametrize("shape", [(12, 16), (12, 16, 3), (16, 12, 3, 2)])
@given(alpha=alphas, seed=seeds)
def test_factored_blocks_match_the_definition(shape, alpha, seed):
    adapter, weight = LoKr(rank=2, alpha=alpha, factor=2), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    V, T = shape[0] // 2, shape[1] // 2
    right = (factors["b_VR"] @ factors["a_RT"]).view(V, T, *shape[2:])
    naive = lokr_naive(weight, factors["c_US"], right, scale=alpha / 2)
    torch.testing.assert_close(adapter.adapted(weight, factors), naive)


@given(alpha=alphas, seed=seeds)
def test_lycoris_forms_the_same_update_of_a_kernel(alpha, seed):
    from lycoris.functional.lokr import diff_weight

    adapter, weight = LoKr(rank=2, alpha=alpha, factor=4), random_weight((24, 16, 3, 3), seed)
    factors = random_factors(adapter, weight, seed)
    right = (None, factors["b_VR"], factors["a_RT"].view(2, 4, 3, 3), None)
    theirs = diff_weight(factors["c_US"], None, None, *right, gamma=alpha)  # divides by the rank
    torch.testing.assert_close(adapter.delta(weight, factors), theirs)


@given(seed=seeds)
def test_unrolled_it_is_the_ordinary_product(seed):
    left, right = random_weight((3, 2), seed), random_weight((2, 3, 2, 2), seed + 1)
    torch.testing.assert_close(
        kron(left, right).flatten(1), torch.kron(left, right.flatten(1).contiguous())
    )


@pytest.mark.parametrize("taps", [(), (3, 3)])
def test_the_right_block_is_full_from_half_its_larger_side(taps):
    shape = (48, 80, *taps)  # by factor 4: blocks of 12 and 20
    assert not LoKr(rank=9, factor=4).is_full(shape)
    assert LoKr(rank=10, factor=4).is_full(shape)
    assert LoKr(rank=1, factor=4, full_matrix=True).is_full(shape)
    assert LoKr(rank=9, alpha=3.0, factor=4).gamma(shape) == 3.0 / 9
    assert LoKr(rank=10, alpha=3.0, factor=4).gamma(shape) == 1.0  # alpha has no meaning here
    assert LoKr(rank=9, factor=4).degree(shape) == 3
    assert LoKr(rank=10, factor=4).degree(shape) == 2


@given(rank=ranks, seed=seeds)
def test_rank_multiplies(rank, seed):
    adapter, w_PQ = LoKr(rank=rank, factor=2), random_weight((20, 24), seed)
    delta_PQ = adapter.delta(w_PQ, random_factors(adapter, w_PQ, seed))
    assert torch.linalg.matrix_rank(delta_PQ, rtol=1e-9) == adapter.max_rank((20, 24)) == 2 * rank


def test_starts_as_the_paper_says():
    rng = torch.Generator().manual_seed(0)
    full = LoKr(factor=50).init(torch.empty(2500, 3600, 1, 1), rng)
    assert not full["d_VT"].any()
    factored = LoKr(rank=8, factor=50).init(torch.empty(2500, 3600), rng)
    assert not factored["a_RT"].any()
    # fan-in: the columns that each block contracts
    for factor, fan_in in ((full["c_US"], 50), (factored["c_US"], 50), (factored["b_VR"], 8)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < factor.abs().max() <= bound


@pytest.mark.parametrize(
    ("factor", "shape", "words"),
    [
        (8, (7, 8), "factor 8 cannot split 7 outputs.*needs this layer left out"),
        (8, (8, 13), "cannot split 13 inputs"),
        (2, (8, 15), "cannot split 15 inputs.*a factor of at least 3, or this layer left out"),
    ],
)
def test_refuses_what_does_not_split(factor, shape, words):
    with pytest.raises(ValueError, match=words):
        LoKr(factor=factor).check(shape)


@pytest.mark.parametrize("fields", [{"factor": 1}, {"factor": -1}, {"factor": 2.5}, {"rank": 0}])
def test_refuses_impossible_fields(fields):
    with pytest.raises(ValueError, match="LoKr needs (factor|rank) to be a whole number"):
        LoKr(**fields)
