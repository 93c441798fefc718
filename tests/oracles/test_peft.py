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
from lyco_lab.adapters.dora import DoRA
from lyco_lab.adapters.ia3 import IA3
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.oft import OFT
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
    if "lora_magnitude_vector.weight" in names:
        magnitude = names["lora_magnitude_vector.weight"]
        names["dora_scale"] = names.pop("lora_magnitude_vector.weight").reshape(magnitude.numel())
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
    "lokr": (
        peft.LoKrConfig(r=1, alpha=3, decompose_factor=2),
        LoKr(1, 3.0, factor=2),
        MATRICES,
    ),
    "lokr full": (
        peft.LoKrConfig(r=99, alpha=99, decompose_factor=2),
        LoKr(99, factor=2),
        ["linear", "conv", "point", "strided"],  # not "conv1d": see P2
    ),
    "lokr both": (
        peft.LoKrConfig(r=1, alpha=3, decompose_both=True),
        LoKr(1, 3.0, factor=4, decompose_both=True),
        MATRICES,
    ),
    "lokr tucker": (
        peft.LoKrConfig(r=1, alpha=3, decompose_factor=2, use_effective_conv2d=True),
        LoKr(1, 3.0, factor=2, tucker=True),
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


@pytest.mark.parametrize("kind", [*MATRICES, "conv3d"])
def test_same_dora(kind):
    """Outputs and gradients; peft takes the norms as constant, as `detached` does."""
    adapter = DoRA(LoRA(2, 3.0), detached=True)
    theirs = with_peft(peft.LoraConfig(r=2, lora_alpha=3, use_dora=True), LAYERS[kind]())
    ours, mounted = with_ours(adapter, LAYERS[kind](), theirs)
    x = INPUTS[kind].double()
    torch.testing.assert_close(ours(x), theirs(x), **SAME)
    named = gradients(theirs, x)
    ours(x).square().sum().backward()
    for name, factor in mounted.factors("layer").items():
        given = named[adapter.file_names[name]].view_as(factor)
        torch.testing.assert_close(factor.grad, given, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "point", "strided", "conv3d"])
def test_same_ia3(kind, on_input):
    """peft trains 1 + w, and scales the bias of the layer with its outputs; ours does not."""
    config = peft.IA3Config(feedforward_modules=["layer"] if on_input else [])
    layer = LAYERS[kind]()
    theirs = with_peft(config, layer)
    model = nn.ModuleDict({"layer": copy.deepcopy(layer).double()})
    mounted = attach(model, IA3(on_input=on_input), ["layer"], seed=0)
    (name,) = mounted.factors("layer")
    scale = tensors_of(theirs)["ia3_l"].flatten()
    mounted.load_state_dict({f"layer.{name}": scale - 1})
    x = INPUTS[kind].double()
    expected = theirs(x)
    if layer.bias is not None and not on_input:
        along = [1, -1, *[1] * (x.dim() - 2)] if kind != "linear" else [-1]
        expected = expected + ((1 - scale) * layer.bias.double()).view(along)
    torch.testing.assert_close(model["layer"](x), expected, **SAME)


def test_same_rotation():
    """peft rotates what a layer sees, which is what ours does to the outputs of W transposed."""
    config = peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False)
    theirs = with_peft(config, LAYERS["linear"]())
    rotation = theirs.get_delta_weight("default")
    upper = torch.zeros(2, 4, 4, dtype=torch.float64)
    rows, columns = torch.triu_indices(4, 4, 1)
    upper[:, rows, columns] = tensors_of(theirs)["oft_R.weight"]
    weight_QP = LAYERS["linear"]().double().weight.detach().t().contiguous()
    ours = weight_QP + OFT(4).delta(weight_QP, {"blocks": upper})
    # Inverted in float32, whatever the factors are in.
    torch.testing.assert_close(rotation.double() @ weight_QP, ours, rtol=1e-5, atol=1e-5)


def gradients(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    layer(x).square().sum().backward()
    return dict(zip(tensors_of(layer), trained(layer), strict=True))


def trained(layer: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in layer.parameters() if p.requires_grad]


def test_p1_gradients_of_loha_with_a_core():
    """peft differentiates by hand, and gets both outer factors of a convolution wrong."""
    config, adapter, _ = RIGHT["loha tucker"]
    layer, x = LAYERS["conv"](), INPUTS["conv"].double()
    theirs = with_peft(config, layer)
    ours, mounted = with_ours(adapter, layer, theirs)
    named = gradients(theirs, x)
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


def test_p2_full_lokr_of_a_convolution_in_one_dimension():
    """Not the Kronecker product of its blocks, which the unrolled update is no block matrix of."""
    theirs = with_peft(peft.LoKrConfig(r=99, alpha=99, decompose_factor=2), LAYERS["conv1d"]())
    ours, mounted = with_ours(LoKr(99, factor=2), LAYERS["conv1d"](), theirs)
    left, right = (tensors_of(theirs)[key] for key in ("lokr_w1", "lokr_w2"))
    expected = torch.stack([torch.kron(left, right[..., tap]) for tap in range(3)], -1)
    torch.testing.assert_close(mounted.delta("layer"), expected, **SAME)
    assert relative(theirs.get_delta_weight("default"), expected) > 0.5


def test_p3_oft_destroys_a_convolution_before_it_has_trained():
    """Patches are folded back without dividing by how often each pixel is in one."""
    layer, x = LAYERS["conv"](), INPUTS["conv"]
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["layer"])
    peft.inject_adapter_in_model(config, model)
    assert relative(model["layer"](x), layer(x)) > 0.5
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    attach(model, OFT(4), ["layer"], seed=0)
    torch.testing.assert_close(model["layer"](x), layer(x))


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


def test_p7_dora_at_scale_0():
    """peft still decomposes the weight, by magnitudes that have trained."""
    theirs = with_peft(peft.LoraConfig(r=2, lora_alpha=3, use_dora=True), LAYERS["linear"]())
    ours, mounted = with_ours(DoRA(LoRA(2, 3.0)), LAYERS["linear"](), theirs)
    x, frozen = INPUTS["linear"].double(), LAYERS["linear"]().double()
    theirs.set_scale("default", 0)
    mounted.strength = 0.0
    assert relative(theirs(x), frozen(x)) > 0.2
    assert torch.equal(ours(x), frozen(x))


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
