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
from tests.strategies import GEOMETRIES, layer_and_input, move, seeds

every_adapter = pytest.mark.parametrize("cls", ADAPTERS.values(), ids=ADAPTERS.keys())


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
    layer = nn.Conv2d(4, 8, 3) if cls.takes == "matrix" else nn.LayerNorm(8)
    mounted = attach(nn.Sequential(layer), cls(), ["0"], seed=0)
    move(mounted, 0)
    exact = mounted.delta("0")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mounted.delta("0"), exact)


def test_half_precision_output_is_the_base_plus_the_change():
    layer, x = layer_and_input("linear", 0)
    model, x = nn.Sequential(layer.to(torch.bfloat16)), x.to(torch.bfloat16)
    mounted = attach(model, LoRA(), ["0"], seed=0)
    move(mounted, 0)
    full = layer.weight.float() + mounted.delta("0")
    expected = F.linear(x.float(), full, layer.bias.float())
    torch.testing.assert_close(model(x).float(), expected, rtol=0.02, atol=0.02)
    mounted.merge()
    assert model[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(x).float(), expected, rtol=0.02, atol=0.02)
