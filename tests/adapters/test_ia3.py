"""(IA)3 against its definition, where a scale vanishes, in files, and its exact products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lyco_lab.adapters import plan
from lyco_lab.adapters.ia3 import IA3
from lyco_lab.adapters.mount import attach
from tests.adapters.exact import (
    GROUPED,
    LAYERS,
    PLANS,
    check_change,
    check_derivatives,
    check_plans,
    close,
    example,
    value_and_gradients,
)
from tests.strategies import random_factors, random_weight, seeds

SHAPES = st.sampled_from([(6, 8), (8, 6, 3, 2)])
both = pytest.mark.parametrize("on_input", [False, True])
layers = st.sampled_from(sorted(LAYERS | GROUPED))


@both
@settings(max_examples=15)
@given(shape=SHAPES, seed=seeds)
def test_matches_the_definition_and_lycoris(on_input, shape, seed):
    from lycoris.modules.ia3 import _ia3_weight

    adapter, weight = IA3(on_input), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    (w,) = factors.values()
    naive = weight.clone()
    for p in range(shape[0]):
        for q in range(shape[1]):
            naive[p, q] *= 1 + (w[q] if on_input else w[p])
    torch.testing.assert_close(adapter.adapted(weight, factors), naive)
    written = adapter.to_file(shape, factors)
    theirs = _ia3_weight(weight, written["weight"], on_input, 1, False)
    torch.testing.assert_close(theirs, naive)
    assert written["on_input"].shape == () and bool(written["on_input"]) == on_input
    assert written["weight"].dim() == (1 if len(shape) == 2 else len(shape))
    read = adapter.from_file(shape, written)
    assert read.keys() == factors.keys()
    assert all(torch.equal(read[name], factors[name]) for name in factors)


@both
@settings(max_examples=15)
@given(layer=layers, seed=seeds)
def test_every_plan_is_the_definition(on_input, layer, seed):
    check_plans(layer, IA3(on_input), seed)


@both
@settings(max_examples=15)
@given(layer=layers, seed=seeds)
def test_the_change_alone(on_input, layer, seed):
    check_change(layer, IA3(on_input, alpha=0.7), seed)


@both
@pytest.mark.parametrize("forced", PLANS[:2], ids=str)
@pytest.mark.parametrize("layer", ["narrowing", "2d"])
def test_gradients_agree_with_finite_differences(on_input, forced, layer):
    check_derivatives(layer, IA3(on_input, alpha=0.7), forced)


@both
@pytest.mark.parametrize("forced", PLANS[:2], ids=str)
@settings(max_examples=6)
@given(layer=st.sampled_from(["narrowing", "2d"]), seed=seeds)
def test_a_scale_that_vanishes_loses_no_gradient(on_input, forced, layer, seed):
    """Its row of the output is the bias alone, and says nothing of W x any more."""
    model, mounted, x = example(layer, IA3(on_input), seed)
    with torch.no_grad():
        (w,) = mounted.parameters()
        w[:3] = torch.tensor([-1.0, -1 + 1e-9, -1 - 1e-4])
    with plan.forced("reference"):
        expected = value_and_gradients(model, x, mounted, seed)
    with plan.forced(forced):
        got = value_and_gradients(model, x, mounted, seed)
    assert all(close(one, other) for one, other in zip(got, expected, strict=True))


@both
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_the_bias_is_not_scaled(on_input, strength):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 12)), torch.randn(5, 8)
    mounted = attach(model, IA3(on_input), ["0"], seed=0)
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
    with torch.no_grad():
        mounted.parameters()[0].fill_(0.7)
    mounted.strength = strength
    scaled = (1 + 0.7 * strength) * (x @ model[0].weight.t())
    torch.testing.assert_close(model(x), scaled + model[0].bias)


@both
def test_keeps_one_activation(on_input):
    """The output, or where the inputs are scaled the input."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(96, 96)), torch.randn(8, 96)
    attach(model, IA3(on_input), ["0"], seed=0)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    expected = x if on_input else y
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), expected)}
    assert kept.keys() <= known and expected.untyped_storage().data_ptr() in kept
