"""What must hold for every adapter. A new file in lyco_lab/adapters/ is tested here for free."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lyco_lab.adapters import ADAPTERS, build, describe, plan
from lyco_lab.adapters.base import Additive
from lyco_lab.adapters.kernel import FORM_DENSE, FORM_TOKENS, SIDE_TOKENS
from lyco_lab.adapters.mount import attach
from lyco_lab.errors import UserError
from tests.adapters.gauge import (
    check_equal_runs,
    check_terms,
    check_with_gamma,
    check_zero,
    exact_gauges,
    gauges,
    powers,
)
from tests.adapters.law import cases, check_gradients, check_values
from tests.strategies import (
    adapters_on,
    layer_and_input,
    layers_for,
    move,
    random_factors,
    random_weight,
    seeds,
    shapes_of,
)

every_adapter = pytest.mark.parametrize("cls", ADAPTERS.values(), ids=ADAPTERS.keys())
every_additive = pytest.mark.parametrize(
    "cls",
    [cls for cls in ADAPTERS.values() if issubclass(cls, Additive)],
    ids=lambda cls: cls.__name__,
)


def rng(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def weights(draw, cls):
    """An adapter, a weight that it takes, and a seed."""
    shape, seed = draw(shapes_of(cls)), draw(seeds)
    return draw(adapters_on(cls, shape)), random_weight(shape, seed), seed


def test_the_first_four_are_found():
    assert {"lora", "loha", "lokr", "native"} <= ADAPTERS.keys()


@every_adapter
@settings(max_examples=40)
@given(data=st.data())
def test_forward_merged_scaled_and_reloaded_are_the_definition(cls, data, tmp_path_factory):
    check_values(data.draw(cases(cls)), tmp_path_factory.getbasetemp())


@every_adapter
@settings(max_examples=40)
@given(data=st.data())
def test_gradients_are_those_of_the_definition(cls, data):
    check_gradients(data.draw(cases(cls)))


@every_adapter
@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data())
def test_the_law_holds_in_thousands_of_cases(cls, data, tmp_path_factory):
    case = data.draw(cases(cls))
    check_values(case, tmp_path_factory.getbasetemp())
    check_gradients(case)


@every_adapter
@pytest.mark.parametrize("forced", [SIDE_TOKENS, FORM_TOKENS, FORM_DENSE], ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_every_plan_is_the_definition(cls, forced, data, tmp_path_factory):
    """A kernel that has no such plan takes another, and is tested again: plans never differ."""
    case = data.draw(cases(cls))
    with plan.forced(forced):
        check_gradients(case)
        check_values(case, tmp_path_factory.getbasetemp())


@every_adapter
@given(data=st.data())
def test_starts_at_the_pretrained_weight(cls, data):
    adapter, weight, seed = data.draw(weights(cls))
    assert torch.equal(adapter.adapted(weight, adapter.init(weight, rng(seed))), weight)


@every_adapter
@given(data=st.data())
def test_claims_are_true(cls, data):
    adapter, weight, seed = data.draw(weights(cls))
    shape = tuple(weight.shape)
    start = adapter.init(weight, rng(seed))
    trained = [factor.numel() for name, factor in start.items() if name not in adapter.untrained]
    assert adapter.num_params(shape) == sum(trained)
    assert adapter.factor_shapes(shape) == {key: tuple(f.shape) for key, f in start.items()}
    factors = random_factors(adapter, weight, seed)
    delta = adapter.delta(weight, factors)
    if len(shape) > 1:
        assert torch.linalg.matrix_rank(delta.flatten(1), rtol=1e-9) == adapter.max_rank(shape)
    if "singular values" in adapter.preserves:
        changed = adapter.adapted(weight, factors).flatten(1)
        kept, had = (torch.linalg.svdvals(w) for w in (changed, weight.flatten(1)))
        torch.testing.assert_close(kept, had, rtol=1e-9, atol=1e-9)


@every_adapter
@given(data=st.data())
def test_delta_is_the_change_of_the_weight(cls, data):
    adapter, weight, seed = data.draw(weights(cls))
    factors = random_factors(adapter, weight, seed)
    changed, delta = adapter.adapted(weight, factors), adapter.delta(weight, factors)
    assert changed.shape == weight.shape
    torch.testing.assert_close(delta, changed - weight, rtol=1e-9, atol=1e-9)


@every_adapter
@given(data=st.data())
def test_the_change_is_homogeneous_of_the_claimed_degree(cls, data):
    adapter, weight, seed = data.draw(weights(cls))
    factors = random_factors(adapter, weight, seed)
    degree, delta = adapter.degree(tuple(weight.shape)), adapter.delta(weight, factors)
    fitting = []
    for c in (0.25, -2.0, 3.7):
        scaled = adapter.delta(weight, {key: c * factor for key, factor in factors.items()})
        if degree is not None:
            torch.testing.assert_close(scaled, c**degree * delta, rtol=1e-9, atol=1e-9)
            continue
        share = scaled.flatten() @ delta.flatten() / delta.square().sum()
        fitting.append((scaled - share * delta).norm() <= 1e-9 * scaled.norm() and share >= 0)
    if degree is None:  # a reason is owed, and no power may fit every c
        assert adapter.no_degree
        assert not all(fitting)


@every_adapter
@given(data=st.data())
def test_the_terms_are_as_claimed(cls, data):
    case = data.draw(cases(cls))
    terms = case.options.terms(case.adapter, tuple(case.layer()[0].weight.shape))
    if not terms:
        assert case.adapter.no_degree
        return
    check_terms(case, data.draw(gauges(terms)))


@every_adapter
@given(data=st.data())
def test_gamma_is_a_scale_of_the_factors_bit_for_bit(cls, data):
    case, gamma = data.draw(cases(cls)), data.draw(powers)
    terms = case.options.terms(case.adapter, tuple(case.layer()[0].weight.shape))
    if terms:
        g, scales = data.draw(exact_gauges(terms))
        check_equal_runs(case, (g * gamma, gamma), scales)


@every_adapter
@given(data=st.data())
def test_the_factors_that_start_at_zero_are_those_claimed(cls, data):
    check_zero(data.draw(cases(cls)))


@every_adapter
@given(data=st.data(), gamma=powers)
def test_any_gamma_can_be_had(cls, data, gamma):
    shape = data.draw(shapes_of(cls))
    adapter = data.draw(adapters_on(cls, shape))
    if adapter.terms(shape):
        check_with_gamma(adapter, shape, gamma)
        return
    assert adapter.gamma(shape) is None
    with pytest.raises(ValueError, match=f"{cls.__name__} has no gamma: {adapter.no_degree}"):
        adapter.with_gamma(gamma)


@every_additive
@given(data=st.data())
def test_gamma_stands_before_the_transform(cls, data):
    adapter, weight, seed = data.draw(weights(cls))
    shape, factors = tuple(weight.shape), random_factors(adapter, weight, seed)
    delta = adapter.gamma(shape) * adapter.transform(factors, shape)
    torch.testing.assert_close(adapter.delta(weight, factors), delta)


@every_adapter
@given(data=st.data())
def test_the_scaling_factors_scale_the_change(cls, data):
    """Linearly for additive adapters; for all, none is left at 0 and all of it is there at 1."""
    adapter, weight, seed = data.draw(weights(cls))
    factors = random_factors(adapter, weight, seed)
    names = [name for name in adapter.scaling if name in factors]
    if not adapter.scaling:
        assert not isinstance(adapter, Additive)
        return
    assert names
    for share in (0.0, 0.5, -2.0):
        scaled = factors | {name: share * factors[name] for name in names}
        change, whole = adapter.delta(weight, scaled), adapter.delta(weight, factors)
        if share == 0.0:
            assert not change.any()
        elif isinstance(adapter, Additive):
            torch.testing.assert_close(change, share * whole, rtol=1e-9, atol=1e-9)


@every_adapter
@given(data=st.data())
def test_components_add_up(cls, data):
    """A rank-one term for each index: the change is the sum of what each alone gives.

    Where several factors hold terms, one index is alone in all of them, as one mask drops from all.
    """
    adapter, weight, seed = data.draw(weights(cls))
    factors = random_factors(adapter.inner, weight, seed)
    held = {name: axis for name, axis in adapter.inner.components.items() if name in factors}
    if held:
        (size,) = {factors[name].shape[axis] for name, axis in held.items()}
        total = torch.zeros_like(weight)
        for index in range(size):
            alone = {name: torch.zeros_like(factors[name]) for name in held}
            for name, axis in held.items():
                place = (slice(None),) * axis + (index,)
                alone[name][place] = factors[name][place]
            total = total + adapter.inner.delta(weight, factors | alone)
        whole = adapter.inner.delta(weight, factors)
        torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-9)


@every_adapter
@given(data=st.data())
def test_training_can_leave_the_start(cls, data):
    """Along a linear functional of W', which none can be indifferent to; every factor moves."""
    adapter, weight, seed = data.draw(weights(cls))
    direction = random_weight(tuple(weight.shape), seed + 1)
    factors = adapter.init(weight, rng(seed))
    trained = [key for key in factors if key not in adapter.untrained]
    for key in trained:
        factors[key] = factors[key].clone().requires_grad_()
    started = {key: factors[key].detach().clone() for key in trained}
    for _ in range(4):  # a product of factors of which one is zero frees the others one by one
        loss = (adapter.adapted(weight, factors) * direction).sum()
        gradients = torch.autograd.grad(loss, [factors[key] for key in trained])
        with torch.no_grad():
            for key, gradient in zip(trained, gradients, strict=True):
                factors[key] -= 1e-2 * gradient / gradient.norm().clamp_min(1.0)
    with torch.no_grad():
        assert (adapter.adapted(weight, factors) * direction).sum() < (weight * direction).sum()
    for key in trained:
        assert not torch.equal(factors[key], started[key]), key


@every_adapter
@given(data=st.data())
def test_the_start_depends_on_the_generator_alone(cls, data):
    adapter, weight, seed = data.draw(weights(cls))
    first, second = (adapter.init(weight, rng(seed)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_adapter
@given(data=st.data())
def test_files_can_name_each_factor(cls, data):
    adapter, weight, _ = data.draw(weights(cls))
    names = [adapter.file_names[key] for key in adapter.factor_shapes(tuple(weight.shape))]
    assert len(set(names)) == len(names)
    assert adapter.file_algo


@every_adapter
def test_fields_are_a_strict_configuration(cls):
    assert hash(cls()) == hash(cls())
    described = describe(cls())
    assert build(described) == cls()
    with pytest.raises(UserError, match="has no 'rnak'"):
        build({**described, "rnak": 3})
    if "rank" in described:
        with pytest.raises(UserError, match="rank.*'many'"):
            build({**described, "rank": "many"})


@every_adapter
@pytest.mark.parametrize("shape", [(), (5,), (0, 4)])
def test_refuses_what_is_no_weight(cls, shape):
    if cls.takes == "matrix":
        with pytest.raises(ValueError, match="outputs x inputs"):
            cls().check(shape)


@every_adapter
@given(data=st.data(), seed=seeds)
def test_the_base_comes_back_exactly(cls, data, seed):
    geometry = data.draw(st.sampled_from(layers_for(cls)))
    layer, x = layer_and_input(geometry, seed)
    base = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    adapter = data.draw(adapters_on(cls, tuple(layer.weight.shape)))
    mounted = attach(model, adapter, ["0"], seed=seed % 1000)
    move(mounted, seed)
    adapted, ordinary = model(x), base(x)
    assert not torch.equal(adapted, ordinary)
    with mounted.disabled():
        assert torch.equal(model(x), ordinary)
    mounted.strength = 0.0
    assert torch.equal(model(x), ordinary)
    assert not mounted.delta("0").any()
    mounted.merge()
    assert torch.equal(model(x), ordinary)
    mounted.unmerge()
    mounted.strength = 1.0
    mounted.merge()
    mounted.unmerge()
    assert torch.equal(model[0].weight, base.weight)
    assert torch.equal(model(x), adapted)
    mounted.detach()
    assert type(model[0]) is type(base)
    assert model[0].state_dict().keys() == base.state_dict().keys()
    assert torch.equal(model[0].weight, base.weight)
    assert torch.equal(model(x), ordinary)


@every_adapter
def test_nothing_of_a_weights_size_is_kept(cls):
    """For the backward pass, by any plan, whatever the call's size."""
    for shape, tokens in (((48, 96), 7), ((48, 96), 500)):
        layer = nn.Linear(shape[1], shape[0]) if cls.takes == "matrix" else nn.LayerNorm(96)
        model = nn.Sequential(layer)
        adapter = data_free(cls)
        mounted = attach(model, adapter, ["0"], seed=0)
        move(mounted, 0)
        x = torch.randn(tokens, 96, requires_grad=True)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = []

        def keep(tensor, own=own, kept=kept):
            if tensor.untyped_storage().data_ptr() not in own:
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model(x)
        shared = {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()}
        sizes = [t.numel() for t in kept if t.untyped_storage().data_ptr() not in shared]
        assert max(sizes, default=0) < shape[0] * shape[1] / 2


def data_free(cls):
    """The adapter as it starts, with a rank that fits a small layer."""
    fields = {f.name for f in dataclasses.fields(cls)}
    return cls(**({"rank": 4} if "rank" in fields else {}))
