"""LoHa against its definition, its start, the rank it reaches, and its exact products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyco_lab.adapters import forward
from lyco_lab.adapters.kernel import SIDE_TOKENS
from lyco_lab.adapters.loha import BLOCK, LoHa
from lyco_lab.adapters.mount import attach
from tests.adapters.exact import (
    GROUPED,
    LAYERS,
    PLANS,
    Largest,
    check_change,
    check_derivatives,
    check_merged_in_place,
    check_plans,
)
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


def tucker_naive(weight, f, scale):
    """The definition with cores: each half is a core times a matrix on both its channel axes."""
    out = weight.clone()
    R = len(f["b1_RP"])
    for p in range(weight.shape[0]):
        for q in range(weight.shape[1]):
            halves = [torch.zeros(weight.shape[2:], dtype=weight.dtype) for _ in range(2)]
            for half, name in enumerate("12"):
                b, m, a = f[f"b{name}_RP"], f[f"m{name}_RRk"], f[f"a{name}_RQ"]
                for r in range(R):
                    for s in range(R):
                        halves[half] += b[r, p] * m[r, s] * a[s, q]
            out[p, q] += scale * halves[0] * halves[1]
    return out


@settings(max_examples=15)
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


@settings(max_examples=15)
@given(rank=st.integers(1, 3), alpha=alphas, seed=seeds)
def test_with_cores_it_matches_the_definition(rank, alpha, seed):
    adapter = LoHa(rank=rank, alpha=alpha, tucker=True, rank_stabilised=True)
    weight = random_weight((5, 4, 3, 2), seed)
    factors = random_factors(adapter, weight, seed)
    naive = tucker_naive(weight, factors, scale=alpha / rank**0.5)
    torch.testing.assert_close(adapter.adapted(weight, factors), naive)


@pytest.mark.parametrize("tucker", [False, True])
@settings(max_examples=15)
@given(rank=ranks, alpha=alphas, seed=seeds)
def test_lycoris_forms_the_same_update(tucker, rank, alpha, seed):
    from lycoris.functional.loha import diff_weight

    adapter = LoHa(rank=rank, alpha=alpha, tucker=tucker)
    weight = random_weight((6, 5, 3, 2), seed)
    factors = random_factors(adapter, weight, seed)
    named = {adapter.file_names[name]: factor for name, factor in factors.items()}
    w1u, w1d, w2u, w2d = (named[f"hada_w{i}_{side}"] for i in "12" for side in "ab")
    if not tucker:
        w1d, w2d = w1d.view(rank, 5, 3, 2), w2d.view(rank, 5, 3, 2)
    cores = named.get("hada_t1"), named.get("hada_t2")
    theirs = diff_weight(w1d, w1u, w2d, w2u, *cores, gamma=torch.tensor(alpha / rank))
    torch.testing.assert_close(adapter.delta(weight, factors), theirs)


@given(rank=ranks, seed=seeds)
def test_generic_factors_attain_the_squared_rank(rank, seed):
    adapter, w_PQ = LoHa(rank=rank), random_weight((20, 24), seed)
    delta_PQ = adapter.delta(w_PQ, random_factors(adapter, w_PQ, seed))
    assert torch.linalg.matrix_rank(delta_PQ, rtol=1e-9) == adapter.max_rank((20, 24)) == rank**2


def test_starts_as_the_paper_says():
    rng = torch.Generator().manual_seed(0)
    start = LoHa(rank=50).init(torch.empty(64, 11, 3, 3), rng)
    assert not start["b2_PR"].any()
    for name, std in {"b1_PR": 0.1, "a1_RQ": 1.0, "a2_RQ": 1.0}.items():
        torch.testing.assert_close(start[name].std().item(), std, rtol=0.05, atol=0)
    start = LoHa(rank=40, tucker=True).init(torch.empty(64, 50, 3, 3), rng)
    assert not start["b2_RP"].any()
    stds = {"b1_RP": 0.1, "a1_RQ": 1.0, "m1_RRk": 0.1, "a2_RQ": 1.0, "m2_RRk": 0.1}
    for name, std in stds.items():
        torch.testing.assert_close(start[name].std().item(), std, rtol=0.05, atol=0)


def test_a_core_is_for_kernels_of_several_taps():
    adapter = LoHa(rank=2, alpha=3.0, tucker=True)
    assert adapter.degree((8, 6, 3)) == 6
    assert adapter.num_params((8, 6, 3)) == 2 * (2 * 8 + 2 * 6 + 2 * 2 * 3)
    for one_tap in ((8, 6), (8, 6, 1, 1)):
        assert adapter.degree(one_tap) == 4
        assert adapter.num_params(one_tap) == 2 * 2 * (8 + 6)
    assert LoHa(rank=4, alpha=3.0, rank_stabilised=True).gamma((8, 6)) == 1.5


@pytest.mark.parametrize("fields", [{"rank": 0}, {"alpha": float("inf")}])
def test_refuses_what_cannot_scale(fields):
    with pytest.raises(ValueError, match="LoHa needs"):
        LoHa(**fields)


def test_refuses_a_rank_that_exceeds_the_sides():
    with pytest.raises(ValueError, match="LoHa needs rank to be at most 6 here.*got 7"):
        LoHa(rank=7).check((8, 6))


loha = st.builds(LoHa, rank=st.integers(1, 3), alpha=alphas, tucker=st.booleans())


@pytest.mark.parametrize("layer", LAYERS)
@settings(max_examples=8)
@given(adapter=loha, seed=seeds)
def test_every_plan_is_exact(layer, adapter, seed):
    check_plans(layer, adapter, seed)


@pytest.mark.parametrize("layer", [*LAYERS, *GROUPED])
@settings(max_examples=5)
@given(adapter=loha, seed=seeds)
def test_merges_in_place(layer, adapter, seed):
    check_merged_in_place(layer, adapter, seed)


@pytest.mark.parametrize("layer", [*LAYERS, *GROUPED])
@settings(max_examples=8)
@given(adapter=loha, seed=seeds)
def test_the_change_is_exact(layer, adapter, seed):
    check_change(layer, adapter, seed)


@given(seed=seeds)
def test_the_change_of_a_large_layer_goes_through_the_pair(seed):
    """There the pair is smaller than the weight, and the weight is not formed."""
    adapter, w_PQ = LoHa(rank=2, alpha=1.5), random_weight((40, 48), seed)
    layer = torch.nn.Linear(48, 40, dtype=torch.float64)
    attach(torch.nn.Sequential(layer), adapter, ["0"], seed=0)
    frozen = forward.Frozen(layer, torch.float64)
    factors = random_factors(adapter, w_PQ, seed)
    x = random_weight((3, 48), seed)
    with Largest() as made:
        change = adapter.change(frozen, x, factors)
    assert made.entries < w_PQ.numel()
    torch.testing.assert_close(change, x @ adapter.delta(w_PQ, factors).t())


@pytest.mark.parametrize("forced", PLANS, ids=str)
@pytest.mark.parametrize("layer", ["widening", "1d"])
def test_derivatives_are_those_of_finite_differences(layer, forced):
    check_derivatives(layer, LoHa(rank=2, alpha=1.5, tucker=True), forced)


def test_second_derivatives_are_those_of_finite_differences():
    check_derivatives("1d", LoHa(rank=1, alpha=1.5, tucker=True), SIDE_TOKENS, twice=True)


def test_merging_in_place_makes_no_second_weight():
    shape = (512, BLOCK // 256)
    adapter, w_PQ = LoHa(rank=2, alpha=1.5), random_weight(shape, 0)
    factors = random_factors(adapter, w_PQ, 0)
    expected = adapter.adapted(w_PQ, factors)
    with Largest(w_PQ) as made:
        adapter.kernel(shape).form(w_PQ, factors, out=w_PQ)
    assert made.entries <= BLOCK < w_PQ.numel()
    torch.testing.assert_close(w_PQ, expected)
