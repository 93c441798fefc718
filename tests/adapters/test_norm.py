"""Norm: the layer with its scale and offset moved, in any precision and on any affine shape."""

import pytest
import torch
from torch import nn

from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.norm import Norm
from lyco_lab.adapters.options import Options
from tests.strategies import NORMS, layer_and_input, move


def adapted(geometry):
    layer, x = layer_and_input(geometry, 0)
    model = nn.Sequential(layer)
    mounted = attach(model, Norm(), ["0"], seed=0)
    move(mounted, 1)
    return model, mounted, x


@pytest.mark.parametrize("geometry", NORMS)
def test_is_the_layer_with_its_parameters_moved(geometry):
    model, mounted, x = adapted(geometry)
    plain, _ = layer_and_input(geometry, 0)
    factors = dict(sorted(mounted.factors("0").items(), reverse=True))  # the scale, the offset
    has_bias = getattr(plain, "bias", None) is not None
    assert factors.keys() == ({"dw", "bias"} if has_bias else {"dw"})
    assert mounted.num_params == sum(p.numel() for p in plain.parameters())
    with torch.no_grad():
        plain.weight += factors["dw"]
        if has_bias:
            plain.bias += factors["bias"]
    torch.testing.assert_close(model(x), plain(x))
    trained = torch.autograd.grad(model(x).square().sum(), list(factors.values()))
    wanted = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    for gradient, want in zip(trained, wanted, strict=True):
        torch.testing.assert_close(gradient, want)
    mounted.merge()
    assert type(model[0]) is type(plain)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("mode", ["half weights", "autocast"])
@pytest.mark.parametrize("geometry", NORMS)
def test_half_precision_keeps_small_changes(geometry, mode):
    """Of the scale and of the offset, both lost in a bfloat16 sum with what they change."""
    layer, x = layer_and_input(geometry, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
    plain, model = layer_and_input(geometry, 0)[0], nn.Sequential(layer)
    x = x.repeat(64, *[1] * (x.dim() - 1)).mul(1.0)
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    if mode == "half weights":
        model, x = model.bfloat16(), x.bfloat16()
    mounted = attach(model, Norm(), ["0"], seed=0)
    move(mounted, 1, size=1e-3)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        with_it = model(x)
        with mounted.disabled():
            without = model(x)
    change = with_it.double() - without.double()
    factors = mounted.factors("0")
    with torch.no_grad():
        plain.weight.copy_(factors["dw"])
        if "bias" in factors:
            plain.bias.copy_(factors["bias"])
        expected = plain(x.float()).double()
    # Rounding the output is noise of no preferred sign; the change has a part that it hides not.
    share = (change * expected).sum() / expected.square().sum()
    assert abs(share - 1) < 0.1
    assert change.any()


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(8, elementwise_affine=False), nn.GroupNorm(2, 8, affine=False)]
)
def test_a_layer_that_scales_nothing_is_refused(layer):
    with pytest.raises(ValueError, match="has no weight; leave it out"):
        attach(nn.Sequential(layer), Norm(), ["0"], seed=0)


def test_input_dropout_is_refused():
    with pytest.raises(ValueError, match="normalised input.*use module_dropout"):
        attach(nn.Sequential(nn.LayerNorm(8)), Norm(), ["0"], seed=0, options=Options(dropout=0.1))


def test_a_matrix_is_refused():
    with pytest.raises(ValueError, match="this adapter is for norm layers"):
        attach(nn.Sequential(nn.Linear(8, 8)), Norm(), ["0"], seed=0)
