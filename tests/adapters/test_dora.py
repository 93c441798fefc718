"""DoRA against its definition, at its start, where rows vanish, and its exact products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lyco_lab.adapters import ADAPTERS, build, describe, plan
from lyco_lab.adapters.dora import MAGNITUDE, DoRA
from lyco_lab.adapters.kernel import FORM_TOKENS, SIDE_TOKENS
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.rescale import SMALLEST
from tests.adapters.exact import (
    GROUPED,
    LAYERS,
    PLANS,
    Largest,
    base_output,
    check_change,
    check_derivatives,
    check_plans,
    close,
    example,
    value_and_gradients,
)
from tests.strategies import alphas, move, random_factors, random_weight, seeds

INNER = [
    LoRA(rank=2, alpha=1.5),
    LoRA(rank=3, alpha=2.5, tucker=True),
    LoHa(rank=2, alpha=1.5),
    LoKr(rank=1, alpha=2.5, factor=2),
    Native(),
]
inner = pytest.mark.parametrize("of", INNER, ids=lambda of: type(of).__name__)
axes = st.sampled_from(["out", "in"])


def dora_naive(weight, change, m, axis):
    """The definition, one slice at a time: its length taken away, its magnitude put on."""
    out = weight + change
    for i in range(out.shape[0 if axis == "out" else 1]):
        piece = out[i] if axis == "out" else out[:, i]
        length = sum(float(entry) ** 2 for entry in piece.flatten()) ** 0.5
        piece *= m.flatten()[i] / length
    return out


@inner
@settings(max_examples=8)
@given(axis=axes, shape=st.sampled_from([(6, 8), (8, 6, 3, 2)]), seed=seeds)
def test_matches_the_definition(of, axis, shape, seed):
    adapter, weight = DoRA(of, axis), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    m = factors.pop(MAGNITUDE)
    naive = dora_naive(weight, of.delta(weight, factors), m, axis)
    given_factors = {**factors, MAGNITUDE: m}
    torch.testing.assert_close(adapter.adapted(weight, given_factors), naive)
    torch.testing.assert_close(adapter.delta(weight, given_factors), naive - weight)


@pytest.mark.parametrize("on_out", [True, False])
@given(alpha=alphas, shape=st.sampled_from([(6, 8), (8, 6, 3, 2)]), seed=seeds)
def test_lycoris_decomposes_alike(on_out, alpha, shape, seed):
    from lycoris.functional.general import weight_decompose

    adapter, weight = DoRA(LoRA(2, alpha), "out" if on_out else "in"), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    merged = weight + adapter.of.delta(weight, factors)
    theirs = weight_decompose(merged, factors[MAGNITUDE], wd_on_out=on_out)
    torch.testing.assert_close(adapter.adapted(weight, factors), theirs, rtol=1e-6, atol=1e-6)


@inner
@settings(max_examples=8)
@given(
    layer=st.sampled_from(sorted(LAYERS | GROUPED)), axis=axes, detached=st.booleans(), seed=seeds
)
def test_every_plan_is_the_definition(of, layer, axis, detached, seed):
    check_plans(layer, DoRA(of, axis, detached), seed)


@inner
@settings(max_examples=8)
@given(
    layer=st.sampled_from(sorted(LAYERS | GROUPED)), axis=axes, detached=st.booleans(), seed=seeds
)
def test_the_change_alone(of, layer, axis, detached, seed):
    check_change(layer, DoRA(of, axis, detached), seed)


@pytest.mark.parametrize("forced", PLANS, ids=str)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("layer", ["narrowing", "2d"])
def test_gradients_agree_with_finite_differences(forced, axis, layer):
    check_derivatives(layer, DoRA(LoRA(2, 1.5), axis), forced)


def test_second_derivatives_agree_with_finite_differences():
    check_derivatives("widening", DoRA(LoRA(1, 1.5)), SIDE_TOKENS, twice=True)


@inner
@settings(max_examples=8)
@given(axis=axes, seed=seeds)
def test_detached_takes_the_lengths_as_constants(of, axis, seed):
    """The same value; the gradients are those with the lengths computed beforehand."""
    adapter, weight = DoRA(of, axis, detached=True), random_weight((8, 12), seed)
    factors = {k: f.requires_grad_() for k, f in random_factors(adapter, weight, seed).items()}
    m = factors[MAGNITUDE]
    rule = {name: factor for name, factor in factors.items() if name != MAGNITUDE}
    formed = weight + of.delta(weight, rule)
    lengths = formed.detach().square().sum(1 if axis == "out" else 0, keepdim=True).sqrt()
    direction = random_weight((8, 12), seed + 1)
    wanted = torch.autograd.grad((m * formed / lengths * direction).sum(), list(factors.values()))
    for compute in (adapter.adapted, adapter.delta):
        value = (compute(weight, factors) * direction).sum()
        for one, other in zip(
            torch.autograd.grad(value, list(factors.values())), wanted, strict=True
        ):
            torch.testing.assert_close(one, other)
    attached = DoRA(of, axis).adapted(weight, factors)
    assert torch.equal(adapter.adapted(weight, factors), attached)
    moved = torch.autograd.grad((attached * direction).sum(), list(factors.values()))
    assert not all(torch.allclose(one, other) for one, other in zip(moved, wanted, strict=True))


@inner
@pytest.mark.parametrize("layer", ["narrowing", "widening", "1x1", "1d", "2d", "grouped"])
@settings(max_examples=3)
@given(axis=axes, seed=seeds)
def test_starts_at_the_frozen_layer_bit_for_bit(of, layer, axis, seed):
    """In float32, by every plan; and by the change, which is zero."""
    make, shape = (LAYERS | GROUPED)[layer]
    model, x = nn.Sequential(make()), torch.randn(shape)
    attach(model, DoRA(of, axis), ["0"], seed=seed % 1000)
    frozen = base_output(model[0], x)
    for forced in ["reference", *PLANS]:
        with plan.forced(forced):
            assert torch.equal(model(x), frozen), forced
    attach(model, Native(), ["0"], seed=0)
    assert torch.equal(model(x), frozen)


def test_init_scale_leaves_the_magnitude_where_the_weight_put_it():
    model = nn.Sequential(nn.Linear(8, 12))
    mounted = attach(model, DoRA(LoRA(2)), ["0"], seed=0, init_scale=0.25)
    assert not mounted.delta("0").any()
    whole = attach(nn.Sequential(nn.Linear(8, 12)), DoRA(LoRA(2)), ["0"], seed=0).factors("0")
    assert torch.equal(mounted.factors("0")["a_RQ"], 0.25 * whole["a_RQ"])


@inner
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
@settings(max_examples=8)
@given(axis=axes, seed=seeds)
def test_the_strength_multiplies_the_change(of, strength, axis, seed):
    model, mounted, x = example("narrowing", DoRA(of, axis), seed)
    base, delta = mounted.base_weight("0"), mounted.delta("0")
    mounted.strength = strength
    torch.testing.assert_close(mounted.delta("0"), strength * delta)
    expected = torch.nn.functional.linear(x, base + strength * delta, model[0].bias)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("forced", ["reference", *PLANS], ids=str)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_slice_of_zeros_is_no_division_by_zero_and_can_leave(forced, axis):
    """A row and a column of W are zero: at the start, after a step, and after another."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 12), torch.randn(5, 8)
    with torch.no_grad():
        layer.weight[0], layer.weight[:, 0] = 0, 0
    frozen = layer(x)
    model = nn.Sequential(layer)
    mounted = attach(model, DoRA(LoRA(2, 2.0), axis), ["0"], seed=0)
    goal = torch.randn(5, 12)
    with plan.forced(forced):
        assert torch.equal(model(x), frozen)
        for _ in range(4):
            grads = torch.autograd.grad((model(x) - goal).square().sum(), mounted.parameters())
            with torch.no_grad():
                for factor, grad in zip(mounted.parameters(), grads, strict=True):
                    assert torch.isfinite(grad).all()
                    factor -= 1e-2 * grad
    delta = mounted.delta("0")
    assert torch.isfinite(delta).all()
    assert delta[0].any() if axis == "out" else delta[:, 0].any()


@pytest.mark.parametrize("forced", PLANS, ids=str)
@settings(max_examples=6)
@given(layer=st.sampled_from(["narrowing", "2d"]), seed=seeds)
def test_small_and_vanishing_magnitudes_lose_no_digits(forced, layer, seed):
    """The output cannot be divided by them; the gradient of m is exact all the same."""
    model, mounted, x = example(layer, DoRA(LoRA(2, 1.5)), seed)
    with torch.no_grad():
        m = mounted.factors("0")[MAGNITUDE]
        m.view(-1)[:3] = torch.tensor([0.0, 1e-9, -1e-3 * SMALLEST])
    with plan.forced("reference"):
        expected = value_and_gradients(model, x, mounted, seed)
    with plan.forced(forced):
        got = value_and_gradients(model, x, mounted, seed)
    assert all(close(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("left", [1e-2, 1e-4])
def test_a_row_that_the_update_nearly_takes_away_keeps_its_length(left):
    """Where W + gamma B A is small, |W|**2 + ... would be what rounding left of it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(5, 64)
    mounted = attach(model, DoRA(LoRA(1, 1.0)), ["0"], seed=0)
    factors = mounted.factors("0")
    with torch.no_grad():
        factors["a_RQ"].copy_(model[0].weight[:1])
        factors["b_PR"][0] = -1 + left
        weight = model[0].weight.double()
        given_factors = {name: factor.double() for name, factor in factors.items()}
        expected = mounted.adapter.adapted(weight, given_factors) @ x.double().t()
        with plan.forced(SIDE_TOKENS):
            y = model(x) - model[0].bias
        # What is left of the row was rounded as an entry of W is.
        assert (y[:, 0] - expected[0]).norm() <= 4e-7 / left * expected[0].norm()


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_tiny_change_keeps_its_digits(size, axis):
    """delta in float32 of an update far below W's last digit, against float64."""
    adapter, rng = DoRA(LoRA(2, 2.0), axis), torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=rng)
    factors = adapter.init(weight, rng)
    factors["b_PR"] = size * torch.randn(48, 2, generator=rng)
    double = {name: factor.double() for name, factor in factors.items()}
    n = torch.linalg.vector_norm(weight.double(), dim=1 if axis == "out" else 0, keepdim=True)
    double[MAGNITUDE] = n  # of which m is the nearest float32
    expected = adapter.delta(weight.double(), double)
    delta = adapter.delta(weight, factors)
    assert (delta - expected).norm() <= 1e-5 * expected.norm()  # the sum along W has both signs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_half_precision_keeps_a_small_change(dtype, axis):
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 24, bias=False).to(dtype), torch.randn(7, 16).to(dtype)
    with torch.no_grad():  # the base maps the input to zero: what comes out is the change
        layer.weight[:, 8:] = layer.weight[:, :8]
        x[:, 8:] = -x[:, :8]
    model = nn.Sequential(layer)
    mounted = attach(model, DoRA(LoRA(2, 2.0), axis), ["0"], seed=0)
    with torch.no_grad():
        mounted.factors("0")["b_PR"].copy_(3e-4 * torch.randn(24, 2))
    expected = mounted.delta("0") @ x.float().t()
    assert (model(x).float().t() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_keeps_nothing_of_the_weights_size(dtype, axis):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(96, 96, dtype=dtype)), torch.randn(8, 96, dtype=dtype)
    mounted = attach(model, DoRA(LoRA(2, 2.0), axis), ["0"], seed=0)
    move(mounted, 0)
    sizes = []
    known = model[0].weight.untyped_storage().data_ptr()

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() != known:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert sizes and max(sizes) <= 8 * 96


def test_side_forms_nothing_of_the_weights_size():
    model, mounted, x = example("narrowing", DoRA(LoRA(1, 1.5)), 0)
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    with plan.forced(SIDE_TOKENS):
        with Largest(model[0].weight) as seen:
            y = model(x)
        assert seen.entries < 24 * 12
        with Largest(model[0].weight) as seen:
            torch.autograd.grad(y.sum(), [x, *mounted.parameters()])
        assert seen.entries < 24 * 12


def test_is_what_it_wraps_where_that_matters():
    adapter = DoRA(LoKr(factor=4), axis="in")
    assert adapter.inner == adapter.of and adapter.file_algo == "lokr"
    assert adapter.file_names[MAGNITUDE] == "dora_scale" and "c_US" in adapter.file_names
    assert adapter.factor_shapes((8, 12, 3, 3))[MAGNITUDE] == (1, 12, 1, 1)
    assert DoRA().factor_shapes((8, 12))[MAGNITUDE] == (8, 1)
    assert adapter.file_alpha((8, 12)) == adapter.of.file_alpha((8, 12))
    assert adapter.degree((8, 12)) is None and adapter.no_degree
    assert DoRA() == DoRA(LoRA())


@given(axis=axes, detached=st.booleans(), of=st.sampled_from(INNER))
def test_a_description_builds_it_again(axis, detached, of):
    adapter = DoRA(of, axis, detached)
    described = describe(adapter)
    assert described["kind"] == "dora" and described["of"] == describe(of)
    assert build(described) == adapter


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"axis": "rows"}, "axis to be 'out' or 'in', got 'rows'"),
        ({"axis": "inn"}, r"did you mean 'in'\?"),
        ({"of": {"kind": "dora"}}, "of to be an adapter that adds to the weight"),
        ({"of": {"kind": "ia3"}}, "of to be an adapter that adds to the weight"),
        ({"of": {"kind": "norm"}}, "of to be an adapter that adds to the weight"),
        ({"of": {"kind": "lorra"}}, r"adapter\.of\.kind is 'lorra'.*did you mean 'lora'\?"),
        ({"of": {"kind": "lora", "rnak": 3}}, r"adapter\.of\.rnak.*did you mean 'rank'\?"),
        ({"of": {"kind": "lora", "rank": 0}}, r"adapter\.of: LoRA needs rank"),
        ({"of": 3}, "adapter.of is 3, needs a section of its own"),
        ({"axsi": "in"}, r"adapter\.axsi: 'dora' has no 'axsi'.*did you mean 'axis'\?"),
        ({"kind": 3}, "adapter.kind is 3, needs one of"),
    ],
)
def test_refuses(section, words):
    with pytest.raises(ValueError, match=words):
        build({"kind": "dora"} | section)


@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_every_kind_is_described_and_built_again(kind):
    assert build({"kind": kind.upper()}) == ADAPTERS[kind]() == build(describe(ADAPTERS[kind]()))


@pytest.mark.parametrize("forced", [SIDE_TOKENS, FORM_TOKENS], ids=str)
def test_a_frozen_weight_that_is_written_to_is_seen(forced):
    """The lengths of its rows are kept from call to call."""
    layer = nn.Linear(8, 12)
    model, x = nn.Sequential(layer), torch.randn(5, 8)
    mounted = attach(model, DoRA(of=LoRA(rank=2)), ["0"], seed=0)
    move(mounted, 1)
    with plan.forced(forced):
        model(x)
        model.load_state_dict({"0.weight": torch.randn(12, 8)}, strict=False)
        y = model(x)
        with plan.forced("reference"):
            torch.testing.assert_close(y, model(x))
        layer.weight.data = torch.randn(12, 8)
        y = model(x)
        with plan.forced("reference"):
            torch.testing.assert_close(y, model(x))
