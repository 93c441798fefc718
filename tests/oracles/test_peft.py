"""peft as an oracle: the same numbers where it is right, its faults on record where it is not.

Random factors in float64, so the only tolerance is that of sums taken in another order. A test of
a fault asserts peft's wrong figure: when it fails, peft has mended it and the case joins the rest.
"""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from tests.oracles.layers import INPUTS, LAYERS, relative

SAME = {"rtol": 1e-11, "atol": 1e-11}


def with_peft(config: peft.PeftConfig, layer: nn.Module) -> nn.Module:
    """The layer with peft's adapter on it, all of it random and in float64."""
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    config.target_modules = ["layer"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, model)
    rng = torch.Generator().manual_seed(3)
    for parameter in model.double().parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5, generator=rng)
    return model["layer"]


def tensors_of(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """peft's factors under the names of the kohya layout, which it shares but for LoRA."""
    renamed = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    names = {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    if "lora_embedding_A" in names:  # transposed: its embedding is dim x number
        return {
            "lora_up.weight": names["lora_embedding_A"].T,
            "lora_down.weight": names["lora_embedding_B"].T,
        }
    return {renamed.get(name, name): tensor for name, tensor in names.items()}


def with_ours(adapter: Adapter, layer: nn.Module, theirs: nn.Module):
    """The layer with our adapter on it, with peft's factors."""
    model = nn.ModuleDict({"layer": copy.deepcopy(layer).double()})
    mounted = attach(model, adapter, ["layer"], seed=0)
    shape = tuple(mounted.base_weight("layer").shape)
    factors = adapter.from_file(shape, tensors_of(theirs))
    mounted.load_state_dict({f"layer.{key}": factor for key, factor in factors.items()})
    return model["layer"], mounted


MATRICES = ["linear", "conv", "point", "strided", "conv1d"]
RIGHT = {
    "lora": (peft.LoraConfig(r=2, lora_alpha=3), LoRA(2, 3.0), [*MATRICES, "conv3d", "embedding"]),
    "rslora": (
        peft.LoraConfig(r=3, lora_alpha=3, use_rslora=True),
        LoRA(3, 3.0, rank_stabilised=True),
        MATRICES,
    ),
    "loha": (peft.LoHaConfig(r=2, alpha=3), LoHa(2, 3.0), MATRICES),
    "loha tucker": (
        peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True),
        LoHa(2, 3.0, tucker=True),
        ["linear", "conv", "point", "strided"],
    ),
}
right = pytest.mark.parametrize(
    ("config", "adapter", "kind"),
    [
        pytest.param(config, adapter, kind, id=f"{name} {kind}")
        for name, (config, adapter, kinds) in RIGHT.items()
        for kind in kinds
    ],
)


@right
def test_same_change_and_same_outputs(config, adapter, kind):
    layer, x = LAYERS[kind](), INPUTS[kind].double() if kind != "embedding" else INPUTS[kind]
    theirs = with_peft(config, layer)
    ours, mounted = with_ours(adapter, layer, theirs)
    delta = theirs.get_delta_weight("default")
    torch.testing.assert_close(mounted.delta("layer"), delta, **SAME)
    torch.testing.assert_close(ours(x), theirs(x), **SAME)


def gradients(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    layer(x).square().sum().backward()
    return {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}


def test_p1_gradients_of_loha_with_a_core():
    """peft differentiates by hand, and gets both outer factors of a convolution wrong."""
    config, adapter, _ = RIGHT["loha tucker"]
    layer, x = LAYERS["conv"](), INPUTS["conv"].double()
    theirs = with_peft(config, layer)
    ours, mounted = with_ours(adapter, layer, theirs)
    given = gradients(theirs, x)
    named = {name.replace(".default", ""): gradient for name, gradient in given.items()}
    ours(x).square().sum().backward()
    errors = {}
    for name, factor in mounted.factors("layer").items():
        numeric = torch.empty_like(factor)
        for index in range(factor.numel()):
            numeric.view(-1)[index] = derivative(ours, x, factor, index)
        torch.testing.assert_close(factor.grad, numeric, rtol=1e-6, atol=1e-6)
        suffix = adapter.file_names[name]
        errors[suffix] = relative(named[suffix], factor.grad)
    wrong = {suffix for suffix, error in errors.items() if error > 0.1}
    assert wrong == {"hada_w1_a", "hada_w2_a"}
    assert all(error < 1e-9 for suffix, error in errors.items() if suffix not in wrong)


@torch.no_grad()
def derivative(layer: nn.Module, x: torch.Tensor, factor: torch.Tensor, index: int) -> float:
    """By differences, exact to their second order."""
    losses, step = [], 1e-5
    for sign in (1, -1):
        factor.view(-1)[index] += sign * step
        losses.append(layer(x).square().sum().item())
        factor.view(-1)[index] -= sign * step
    return (losses[0] - losses[1]) / (2 * step)


def around(layer: nn.Conv2d, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The definition on a layer padded around its edges."""
    padded = F.pad(x, (1, 1, 1, 1), mode=layer.padding_mode)
    weight = layer.weight.double() + delta
    return F.conv2d(padded, weight, layer.bias.double())


@pytest.mark.parametrize("mode", ["circular", "reflect"])
@pytest.mark.parametrize("name", ["lora", "loha"])
def test_p4_padding_mode(name, mode):
    """peft pads the change with zeros whatever the layer does."""
    config, adapter, _ = RIGHT[name]
    layer = nn.Conv2d(8, 12, 3, padding=1, padding_mode=mode)
    x = INPUTS["conv"].double()
    theirs = with_peft(config, layer)
    ours, mounted = with_ours(adapter, layer, theirs)
    expected = around(layer, x, mounted.delta("layer"))
    torch.testing.assert_close(ours(x), expected, **SAME)
    change = expected - layer.double()(x)
    assert relative(theirs(x) - layer(x), change) > 0.2


def test_p5_dilated_convolution():
    """peft's LoRA gives its inner convolution no dilation, so the sizes do not match."""
    config, adapter, _ = RIGHT["lora"]
    layer = nn.Conv2d(8, 12, 3, padding=2, dilation=2)
    x = INPUTS["conv"].double()
    theirs = with_peft(config, layer)
    with pytest.raises(RuntimeError):
        theirs(x)
    ours, mounted = with_ours(adapter, layer, theirs)
    weight = layer.double().weight + mounted.delta("layer")
    expected = F.conv2d(x, weight, layer.bias, padding=2, dilation=2)
    torch.testing.assert_close(ours(x), expected, **SAME)


def test_p6_merging_a_grouped_convolution():
    config, adapter, _ = RIGHT["lora"]
    layer = nn.Conv2d(8, 12, 3, padding=1, groups=2)
    x = INPUTS["conv"]
    with pytest.raises(NotImplementedError):
        with_peft(config, layer).merge()
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    mounted = attach(model, adapter, ["layer"], seed=0)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor += 0.1
    before = model["layer"](x)
    mounted.merge()
    torch.testing.assert_close(model["layer"](x), before, rtol=1e-4, atol=1e-5)


def test_p8_merging_back_and_forth_in_half_precision():
    """peft adds and subtracts in bfloat16: the weight drifts. Ours comes back bit for bit."""
    config, adapter, _ = RIGHT["lora"]
    layer = nn.Linear(32, 48).bfloat16()
    theirs = with_peft(config, layer).bfloat16()
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    mounted = attach(model, adapter, ["layer"], seed=0)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor += 0.1
    for _ in range(5):
        theirs.merge()
        theirs.unmerge()
        mounted.merge()
        assert not torch.equal(model["layer"].weight, layer.weight)
        mounted.unmerge()
    assert torch.equal(model["layer"].weight, layer.weight)
    moved = (theirs.base_layer.weight != layer.weight).double().mean()
    assert moved > 0.1
