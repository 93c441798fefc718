"""What must hold for every adapter. A new file in lyco_lab/adapters/ is tested here for free."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError
from torch import nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.base import Additive
from lyco_lab.adapters.mount import attach
from tests.strategies import (
    GEOMETRIES,
    adapters,
    layer_and_input,
    random_factors,
    random_weight,
    seeds,
    shapes,
)

every_adapter = pytest.mark.parametrize("cls", ADAPTERS.values(), ids=ADAPTERS.keys())
every_additive = pytest.mark.parametrize(
    "cls",
    [cls for cls in ADAPTERS.values() if issubclass(cls, Additive)],
    ids=lambda cls: cls.__name__,
)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def test_the_first_four_are_found():
    assert {"lora", "loha", "lokr", "native"} <= ADAPTERS.keys()


@every_adapter
@given(data=st.data(), shape=shapes(), seed=seeds)
def test_starts_at_the_pretrained_weight(cls, data, shape, seed):
    adapter, weight = data.draw(adapters(cls)), random_weight(shape, seed)
    assert torch.equal(adapter.adapted(weight, adapter.init(weight, rng(seed))), weight)


@every_adapter
@given(data=st.data(), shape=shapes(), seed=seeds)
def test_claims_are_true(cls, data, shape, seed):
    adapter, weight = data.draw(adapters(cls)), random_weight(shape, seed)
    adapter.check(shape)
    start = adapter.init(weight, rng(seed))
    assert adapter.num_params(shape) == sum(factor.numel() for factor in start.values())
    assert adapter.factor_shapes(shape) == {key: tuple(f.shape) for key, f in start.items()}
    delta_PQ = adapter.delta(weight, random_factors(adapter, weight, seed)).flatten(1)
    assert torch.linalg.matrix_rank(delta_PQ, rtol=1e-9) == adapter.max_rank(shape)


@every_adapter
@given(data=st.data(), shape=shapes(), seed=seeds)
def test_delta_is_the_change_of_the_weight(cls, data, shape, seed):
    adapter, weight = data.draw(adapters(cls)), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    changed, delta = adapter.adapted(weight, factors), adapter.delta(weight, factors)
    assert changed.shape == weight.shape
    torch.testing.assert_close(delta, changed - weight, rtol=1e-9, atol=1e-9)


@every_additive
@given(data=st.data(), shape=shapes(), seed=seeds, c=st.sampled_from([0.25, -2.0, 3.7]))
def test_the_transform_is_homogeneous_of_the_claimed_degree(cls, data, shape, seed, c):
    adapter, weight = data.draw(adapters(cls)), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    scaled = adapter.transform({key: c * factor for key, factor in factors.items()}, shape)
    expected = c ** adapter.degree(shape) * adapter.transform(factors, shape)
    torch.testing.assert_close(scaled, expected)
    delta = adapter.gamma(shape) * adapter.transform(factors, shape)
    torch.testing.assert_close(adapter.delta(weight, factors), delta)


@every_adapter
@given(data=st.data(), shape=shapes(), seed=seeds)
def test_training_can_leave_the_start(cls, data, shape, seed):
    """Along a linear functional of W', which none can be indifferent to; every factor moves."""
    adapter, weight = data.draw(adapters(cls)), random_weight(shape, seed)
    direction = random_weight(shape, seed + 1)
    factors = {k: f.requires_grad_() for k, f in adapter.init(weight, rng(seed)).items()}
    started = {key: factor.detach().clone() for key, factor in factors.items()}
    for _ in range(4):  # a product of factors of which one is zero frees the others one by one
        loss = (adapter.adapted(weight, factors) * direction).sum()
        gradients = torch.autograd.grad(loss, list(factors.values()))
        with torch.no_grad():
            for factor, gradient in zip(factors.values(), gradients, strict=True):
                factor -= 1e-2 * gradient
    with torch.no_grad():
        assert (adapter.adapted(weight, factors) * direction).sum() < (weight * direction).sum()
    for key, factor in factors.items():
        assert not torch.equal(factor, started[key]), key


@every_adapter
@given(data=st.data(), shape=shapes(), seed=seeds)
def test_the_start_depends_on_the_generator_alone(cls, data, shape, seed):
    adapter, weight = data.draw(adapters(cls)), random_weight(shape, seed)
    first, second = (adapter.init(weight, rng(seed)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_adapter
@given(data=st.data(), shape=shapes())
def test_files_can_name_each_factor(cls, data, shape):
    adapter = data.draw(adapters(cls))
    names = [adapter.file_names[key] for key in adapter.factor_shapes(shape)]
    assert len(set(names)) == len(names)
    assert adapter.file_algo


@every_adapter
def test_fields_are_a_strict_configuration(cls):
    schema = OmegaConf.structured(cls)
    assert OmegaConf.to_object(schema) == cls()
    assert hash(cls()) == hash(cls())
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(schema, {"rnak": 3})
    if "rank" in schema:
        with pytest.raises(ValidationError):
            OmegaConf.merge(schema, {"rank": "many"})


@every_adapter
@pytest.mark.parametrize("shape", [(), (5,), (0, 4)])
def test_refuses_what_is_no_weight(cls, shape):
    with pytest.raises(ValueError, match="outputs x inputs"):
        cls().check(shape)


def mounted_example(cls, data, geometry, seed):
    """A layer inside a model, with an adapter moved away from its start, and an input."""
    layer, x = layer_and_input(geometry, seed)
    model = nn.Sequential(layer)
    mounted = attach(model, data.draw(adapters(cls)), ["0"], seed=seed % 1000)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor += 0.1 * torch.randn(factor.shape, generator=rng(seed))
    return model, mounted, x


@every_adapter
@every_geometry
@given(data=st.data(), seed=seeds)
def test_merging_changes_no_output(cls, geometry, data, seed):
    model, mounted, x = mounted_example(cls, data, geometry, seed)
    mounted.strength = data.draw(st.sampled_from([1.0, 0.5, -1.5]))
    base = copy.deepcopy(GEOMETRIES[geometry][0]())
    before = model(x)
    mounted.merge()
    assert type(model[0]) is type(base)
    assert model.state_dict().keys() == {f"0.{key}" for key in base.state_dict()}
    torch.testing.assert_close(model(x), before)


@every_adapter
@every_geometry
@given(data=st.data(), seed=seeds)
def test_the_base_comes_back_exactly(cls, geometry, data, seed):
    model, mounted, x = mounted_example(cls, data, geometry, seed)
    base = layer_and_input(geometry, seed)[0]
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
@given(data=st.data(), seed=seeds, strength=st.sampled_from([0.25, 0.5, 2.0]))
def test_strength_scales_the_change_of_the_output(cls, data, seed, strength):
    model, mounted, x = mounted_example(cls, data, "3x3", seed)
    with mounted.disabled():
        base = model(x)
    change = model(x) - base
    mounted.strength = strength
    torch.testing.assert_close(model(x) - base, strength * change, rtol=1e-4, atol=1e-4)
