"""LoKr against its definition, its blocks against the paper's equation 5, its exact products."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lyco_lab.adapters.geometry import Linear
from lyco_lab.adapters.kernel import SIDE_TOKENS, Saved
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.linalg import kron, split
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


@given(
    halves=st.tuples(st.integers(1, 8) | st.integers(1, 200), st.integers(1, 200)),
    kernel=st.sampled_from([(), (1, 1), (3, 3)]),
    rank=st.integers(1, 100) | st.just(10000),
    factor=st.integers(2, 32),
    decompose_both=st.booleans(),
)
def test_a_rank_cut_down_to_the_layer_leaves_full_blocks_full(
    halves, kernel, rank, factor, decompose_both
):
    shape = (2 * halves[0], 2 * halves[1], *kernel)
    asked = LoKr(rank=rank, factor=factor, decompose_both=decompose_both, alpha=0.5)
    assume(all(split(side, factor)[0] > 1 for side in shape[:2]))
    fitted = asked.fitted(shape)
    assert fitted.is_full(shape) == asked.is_full(shape)
    assert fitted.left_is_full(shape) == asked.left_is_full(shape)
    assert fitted.num_params(shape) <= asked.num_params(shape)
    assert fitted.gamma(shape) == pytest.approx(asked.gamma(shape), rel=1e-15)


def test_full_blocks_on_four_outputs():
    shape = (4, 320, 3, 3)  # Stable Diffusion's conv_out
    assert LoKr(factor=8).fitted(shape).num_params(shape) == 2 * 8 + 2 * 40 * 9


@settings(max_examples=25)
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


def blocks_naive(f, kernel, T):
    """Both blocks, one product at a time."""
    if "c_US" in f:
        left = f["c_US"]
    else:
        left = sum(torch.outer(f["c_UR"][:, r], f["c_RS"][r]) for r in range(f["c_RS"].shape[0]))
    if "d_VT" in f:
        return left, f["d_VT"]
    R = len(f["a_RT"])
    if "m_RRk" not in f:
        right = sum(torch.outer(f["b_VR"][:, r], f["a_RT"][r]) for r in range(R))
        return left, right.view(-1, T, *kernel)
    right = 0
    for r in range(R):
        for s in range(R):
            entries = torch.outer(f["b_RV"][r], f["a_RT"][s])
            right = right + entries.view(*entries.shape, *[1] * len(kernel)) * f["m_RRk"][r, s]
    return left, right


every_form = st.builds(
    LoKr,
    rank=st.integers(1, 3) | st.just(10000),
    alpha=alphas,
    factor=st.sampled_from([2, 4]),
    full_matrix=st.sampled_from([False, False, False, True]),
    decompose_both=st.booleans(),
    tucker=st.booleans(),
    unbalanced=st.booleans(),
    rank_stabilised=st.booleans(),
)


def names_of(adapter, shape):
    return frozenset(adapter.factor_shapes(shape))


def test_every_form_is_drawn():
    """Each block in each of its forms, with each form of the other."""
    lefts = {True: {"c_US"}, False: {"c_UR", "c_RS"}}
    rights = {"full": {"d_VT"}, "pair": {"b_VR", "a_RT"}, "core": {"b_RV", "a_RT", "m_RRk"}}
    shape = (48, 8, 3)
    for left, left_names in lefts.items():
        for kind, right_names in rights.items():
            # Unbalanced by 2, blocks of 24 x 2 and 2 x 4: rank 2 leaves the right one full.
            adapter = LoKr(
                rank=1 if kind != "full" else 2,
                factor=2,
                decompose_both=not left,
                tucker=kind == "core",
                unbalanced=True,
            )
            assert names_of(adapter, shape) == left_names | right_names


@pytest.mark.parametrize("shape", [(12, 16), (16, 12, 3), (24, 8, 2, 3)])
@settings(max_examples=25)
@given(adapter=every_form, seed=seeds)
def test_every_form_matches_the_definition(shape, adapter, seed):
    weight = random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    left, right = blocks_naive(factors, shape[2:], shape[1] // adapter.sizes(shape)[2])
    factored = not {"c_US", "d_VT"} <= factors.keys()
    scale = adapter.alpha / adapter.rank ** (0.5 if adapter.rank_stabilised else 1.0)
    naive = lokr_naive(weight, left, right, scale=scale if factored else 1.0)
    torch.testing.assert_close(adapter.adapted(weight, factors), naive)


@pytest.mark.parametrize("shape", [(12, 16), (16, 12, 3), (24, 8, 2, 3)])
@settings(max_examples=15)
@given(adapter=every_form, seed=seeds)
def test_lycoris_has_the_same_factors_and_forms_the_same_update(shape, adapter, seed):
    from lycoris.functional.lokr import kron_weight, weight_gen

    weight = random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    named = {adapter.file_names[name]: factor for name, factor in factors.items()}
    keys = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    if not adapter.full_matrix:  # which their function does not apply to both blocks
        theirs = weight_gen(
            weight,
            adapter.rank,
            tucker=adapter.tucker and len(shape) > 2,
            factor=adapter.factor,
            decompose_both=adapter.decompose_both,
            unbalanced_factorization=adapter.unbalanced,
        )
        made = {
            f"lokr_{k}": t.flatten(1).shape
            for k, t in zip(keys, theirs, strict=True)
            if t is not None
        }
        assert made == {key: factor.flatten(1).shape for key, factor in named.items()}
    given = [named.get(f"lokr_{key}") for key in keys]
    if given[5] is not None and given[6] is None:
        given[5] = given[5].view(adapter.rank, -1, *shape[2:])
    # Not their `diff_weight`, which takes the rank of a Tucker block from the wrong axis.
    theirs = kron_weight(*given, scale=adapter.gamma(shape))
    torch.testing.assert_close(adapter.delta(weight, factors), theirs.view(shape))


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


@settings(max_examples=60)
@given(adapter=every_form, shape=st.sampled_from([(12, 16), (16, 12, 3), (48, 8, 2)]))
def test_the_degree_counts_what_is_multiplied(adapter, shape):
    assert adapter.degree(shape) == len(adapter.factor_shapes(shape))


@given(adapter=every_form, shape=st.sampled_from([(12, 16), (16, 12, 3), (48, 8, 2)]), seed=seeds)
def test_generic_factors_attain_the_claimed_rank(adapter, shape, seed):
    weight = random_weight(shape, seed)
    delta = adapter.delta(weight, random_factors(adapter, weight, seed))
    assert torch.linalg.matrix_rank(delta.flatten(1), rtol=1e-9) == adapter.max_rank(shape)


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
    both = LoKr(rank=8, factor=50, decompose_both=True, tucker=True)
    start = both.init(torch.empty(2500, 3600, 3), rng)
    assert not start["a_RT"].any()
    for name, fan_in in {"c_UR": 8, "c_RS": 50, "b_RV": 50, "m_RRk": 24}.items():
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < start[name].abs().max() <= bound


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


@pytest.mark.parametrize("layer", LAYERS)
@settings(max_examples=20)
@given(adapter=every_form, seed=seeds)
def test_every_plan_is_exact(layer, adapter, seed):
    check_plans(layer, adapter, seed)


@pytest.mark.parametrize("layer", [*LAYERS, *GROUPED])
@settings(max_examples=5)
@given(adapter=every_form, seed=seeds)
def test_merges_in_place(layer, adapter, seed):
    check_merged_in_place(layer, adapter, seed)


@pytest.mark.parametrize("layer", [*LAYERS, *GROUPED])
@settings(max_examples=20)
@given(adapter=every_form, seed=seeds)
def test_the_change_is_exact(layer, adapter, seed):
    check_change(layer, adapter, seed)


FORMS = {
    "full": LoKr(factor=2),
    "full, unbalanced": LoKr(factor=2, unbalanced=True),
    "factored": LoKr(factor=2, rank=1, alpha=1.5),
    "all factored": LoKr(factor=4, rank=1, alpha=1.5, decompose_both=True, tucker=True),
}


@pytest.mark.parametrize("forced", PLANS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["widening", "1d"])
def test_derivatives_are_those_of_finite_differences(layer, form, forced):
    check_derivatives(layer, FORMS[form], forced)


def test_second_derivatives_are_those_of_finite_differences():
    check_derivatives("1d", FORMS["all factored"], SIDE_TOKENS, twice=True)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_and_merging_in_place_make_nothing_of_the_weights_size(form):
    adapter, w_PQ = FORMS[form], random_weight((48, 64), 0)
    factors, x = random_factors(adapter, w_PQ, 0), random_weight((3, 64), 1)
    kernel, op = adapter.kernel((48, 64)), Linear()
    expected = adapter.adapted(w_PQ, factors)
    with Largest(w_PQ) as made:
        y, _ = kernel.forward(op, SIDE_TOKENS, x, w_PQ, None, factors)
        saved = Saved(x, tuple(x.shape), w_PQ, None, factors, ())
        kernel.backward(op, SIDE_TOKENS, y, saved, True)
        kernel.form(w_PQ, factors, out=w_PQ)
    torch.testing.assert_close(y, x @ expected.t())
    assert made.entries < w_PQ.numel()
    torch.testing.assert_close(w_PQ, expected)
