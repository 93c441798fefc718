"""Plans: an adapted layer computes the layer with W', and half precision keeps a small delta."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from tests.strategies import GEOMETRIES, adapters, layer_and_input, seeds

every_adapter = pytest.mark.parametrize("cls", ADAPTERS.values(), ids=ADAPTERS.keys())


def move(mounted):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor += 0.1 * torch.randn(factor.shape, generator=rng)


@every_adapter
@pytest.mark.parametrize("geometry", GEOMETRIES)
@given(data=st.data(), seed=seeds)
def test_values_and_gradients_are_those_of_the_layer_with_the_adapted_weight(
    cls, geometry, data, seed
):
    """In float64, against autograd through the layer's own forward."""
    layer, x = layer_and_input(geometry, seed)
    adapter = data.draw(adapters(cls))
    model, x = nn.Sequential(layer.double()), x.double().requires_grad_()
    mounted = attach(model, adapter, ["0"], seed=0)
    assert all(factor.dtype == torch.float64 for factor in mounted.parameters())
    move(mounted)
    y = model(x)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
    inputs = [x, *mounted.parameters()]
    gradients = torch.autograd.grad((y * direction).sum(), inputs)
    plain = GEOMETRIES[geometry][0]().double()
    weight = adapter.adapted(mounted.base_weight("0"), mounted.factors("0"))
    state = {"weight": weight} | ({} if layer.bias is None else {"bias": layer.bias})
    expected = torch.func.functional_call(plain, state, (x,))
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


SMALL = 3e-4  # a delta this far below the weight is lost in a bfloat16 sum with it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["half weights", "autocast"])
@given(geometry=st.sampled_from(["linear", "3x3", "circular"]), seed=seeds)
def test_half_precision_keeps_a_small_delta(dtype, autocast, geometry, seed):
    """Inputs come in pairs that the base maps to zero: what is left of the output is delta's."""
    layer, x = layer_and_input(geometry, seed)
    channels = -1 if geometry == "linear" else 1
    half = x.shape[channels] // 2
    x = torch.cat([x.narrow(channels, 0, half), -x.narrow(channels, 0, half)], channels)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight[:, half:] = layer.weight[:, :half]
    model = nn.Sequential(layer)
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    mounted = attach(model, Native(), ["0"], seed=0)
    (factor,) = mounted.parameters()
    assert factor.dtype == torch.float32
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        factor.copy_(SMALL * layer.weight.abs().mean() * torch.randn(factor.shape, generator=rng))
    exact = GEOMETRIES[geometry][0]()
    exact.weight, exact.bias = nn.Parameter(mounted.delta("0").detach()), None
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        change = model(x)
    assert change.dtype == dtype
    expected = exact(x.float())
    assert (change.float() - expected).norm() < 0.01 * expected.norm()
    change.float().sum().backward()
    assert factor.grad is not None and factor.grad.dtype == torch.float32


@every_adapter
def test_autocast_does_not_touch_delta(cls):
    mounted = attach(nn.Sequential(nn.Conv2d(4, 8, 3)), cls(), ["0"], seed=0)
    move(mounted)
    exact = mounted.delta("0")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mounted.delta("0"), exact)


def test_half_precision_output_is_the_base_plus_the_change():
    layer, x = layer_and_input("linear", 0)
    model, x = nn.Sequential(layer.to(torch.bfloat16)), x.to(torch.bfloat16)
    mounted = attach(model, LoRA(), ["0"], seed=0)
    move(mounted)
    full = layer.weight.float() + mounted.delta("0")
    expected = F.linear(x.float(), full, layer.bias.float())
    torch.testing.assert_close(model(x).float(), expected, rtol=0.02, atol=0.02)
    mounted.merge()
    assert model[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(x).float(), expected, rtol=0.02, atol=0.02)
