"""GLoRA against its definition, the rank it reaches, and its exact products."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyco_lab.adapters import plan
from lyco_lab.adapters.glora import GLoRA
from lyco_lab.adapters.kernel import SIDE_TOKENS
from tests.adapters.exact import (
    GROUPED,
    LAYERS,
    PLANS,
    Largest,
    check_change,
    check_derivatives,
    check_plans,
    example,
)
from tests.strategies import alphas, random_factors, random_weight, ranks, seeds

layers = st.sampled_from(sorted(LAYERS | GROUPED))


def glora_naive(weight, f, scale):
    """The definition, one entry at a time; each tap is mixed alike."""
    (P, Q), R = weight.shape[:2], f["a2_RQ"].shape[0]
    out = weight.clone()
    for p in range(P):
        for q in range(Q):
            for r in range(R):
                for s in range(Q):
                    out[p, q] += scale * weight[p, s] * f["a1_QR"][s, r] * f["a2_RQ"][r, q]
                out[p, q] += scale * f["b1_PR"][p, r] * f["b2_RQ"][r, q]
    return out


@settings(max_examples=10)
@given(rank=st.integers(1, 3), alpha=alphas, stabilised=st.booleans(), seed=seeds)
@pytest.mark.parametrize("shape", [(5, 4), (4, 5, 2, 3)])
def test_matches_the_definition(shape, rank, alpha, stabilised, seed):
    adapter, weight = GLoRA(rank, alpha, rank_stabilised=stabilised), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    naive = glora_naive(weight, factors, alpha / (math.sqrt(rank) if stabilised else rank))
    torch.testing.assert_close(adapter.adapted(weight, factors), naive)


@settings(max_examples=10)
@given(rank=ranks, alpha=alphas, seed=seeds)
@pytest.mark.parametrize("shape", [(6, 8), (8, 6, 3, 2)])
def test_lycoris_forms_the_same_update(shape, rank, alpha, seed):
    from lycoris.modules.glora import _glora_weight

    adapter, weight = GLoRA(rank, alpha), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    file = adapter.to_file(shape, factors)
    pair = (file[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    theirs = _glora_weight(weight, *pair, None, alpha / rank)
    torch.testing.assert_close(adapter.delta(weight, factors), theirs)
    read = adapter.from_file(shape, file)
    assert all(torch.equal(read[name], factors[name]) for name in factors)


@settings(max_examples=25)
@given(layer=layers, rank=ranks, alpha=alphas, seed=seeds)
def test_every_plan_is_the_definition(layer, rank, alpha, seed):
    check_plans(layer, GLoRA(rank, alpha), seed)


@settings(max_examples=15)
@given(layer=layers, rank=ranks, alpha=alphas, seed=seeds)
def test_the_change_alone(layer, rank, alpha, seed):
    check_change(layer, GLoRA(rank, alpha), seed)


@pytest.mark.parametrize("forced", PLANS, ids=str)
@pytest.mark.parametrize("layer", ["narrowing", "1d"])
def test_gradients_agree_with_finite_differences(forced, layer):
    check_derivatives(layer, GLoRA(2, 1.5), forced)


@pytest.mark.parametrize(("layer", "entries"), [("narrowing", 24 * 12), ("2d", 12 * 8 * 6)])
def test_side_forms_nothing_of_the_weights_size(layer, entries):
    """Activations are smaller here, too."""
    model, mounted, x = example(layer, GLoRA(1, 1.5), 0)
    x = x[:1].detach().requires_grad_()
    with plan.forced(SIDE_TOKENS), Largest(model[0].weight) as seen:
        y = model(x)
        torch.autograd.grad(y.sum(), [x, *mounted.parameters()])
    assert seen.entries < entries


def test_a_kernel_takes_the_rank_of_every_tap():
    assert GLoRA(2).max_rank((20, 24)) == 4
    assert GLoRA(2).max_rank((40, 24, 3, 3)) == 2 * 9 + 2
    assert GLoRA(6).max_rank((40, 4, 3, 1)) == 12  # of 4 inputs no more than 4 can be mixed


def test_refuses_ranks_as_lora_does():
    with pytest.raises(ValueError, match="GLoRA needs rank to be a whole number >= 1, got 0"):
        GLoRA(rank=0)
    with pytest.raises(ValueError, match="GLoRA needs rank to be at most 4 here"):
        GLoRA(rank=5).check((4, 8))
