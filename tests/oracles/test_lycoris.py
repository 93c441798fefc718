"""lycoris-lora as an oracle: its rules, its files and its reader, where it agrees with itself.

Changes are compared with changes, so that the frozen layer hides no error. LyCORIS computes in
float32 and most of its modules as (W + delta) - W; a sum of up to 216 products there, and that
difference, are worth less than BOUND. What LyCORIS gets wrong is in `test_lycoris_faults.py`.
"""

import copy
import logging
from collections.abc import Mapping

import pytest
import safetensors.torch
import torch
from lycoris.functional import locon as lora
from lycoris.functional import loha, lokr
from lycoris.kohya import create_network, create_network_from_weights
from lycoris.logging import logger
from lycoris.modules import get_module, make_module
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

from lyco_lab.adapters.base import Adapter, Additive
from lyco_lab.adapters.boft import BOFT
from lyco_lab.adapters.dora import DoRA
from lyco_lab.adapters.dylora import DyLoRA
from lyco_lab.adapters.glora import GLoRA
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.norm import Norm
from lyco_lab.adapters.oft import OFT
from lyco_lab.adapters.options import Options
from lyco_lab.config import Model
from lyco_lab.diffusion.targets import chosen
from lyco_lab.formats import foreign, kohya
from tests.oracles.layers import INPUTS, LAYERS, relative

logger.setLevel(logging.ERROR)

BOUND = 2e-5
MATRICES = ["linear", "conv", "point", "strided", "conv1d", "conv3d"]
NORMS = ["layer norm", "group norm"]


def random_module(cls: type, layer: nn.Module, **settings) -> nn.Module:
    """A module of LyCORIS for the layer, all that it trains random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        module = cls("lora_unet_layer", layer, 1.0, **settings)
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return module.eval()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The file that LyCORIS writes for it."""
    return {
        f"lora_unet_layer.{suffix}": tensor.detach().clone().contiguous()
        for suffix, tensor in module.state_dict().items()
    }


@torch.no_grad()
def change(layer: nn.Module, frozen: nn.Module, x: Tensor) -> Tensor:
    return layer(x) - frozen(x)


# -- the rules ------------------------------------------------------------------------------------


def generic(adapter: Adapter, kind: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A weight, the file's tensors of random factors on it, and our delta; in float64."""
    weight = LAYERS[kind]().double().weight.detach()
    rng = torch.Generator().manual_seed(7)
    shape = tuple(weight.shape)
    factors = {
        name: torch.randn(size, dtype=torch.float64, generator=rng)
        for name, size in adapter.factor_shapes(shape).items()
    }
    return weight, adapter.to_file(shape, factors), adapter.delta(weight, factors)


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize(
    "adapter",
    [LoRA(3, 2.0), LoRA(3, 2.0, tucker=True), LoRA(3, 2.0, rank_stabilised=True)],
    ids=str,
)
def test_lora_is_theirs(adapter, kind):
    weight, tensors, delta = generic(adapter, kind)
    down, up, mid = (tensors.get(f"lora_{name}.weight") for name in ("down", "up", "mid"))
    gamma = adapter.file_alpha(tuple(weight.shape)) / 3
    torch.testing.assert_close(lora.diff_weight(down, up, mid, gamma=gamma), delta)


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("adapter", [LoHa(3, 2.0), LoHa(3, 2.0, tucker=True)], ids=str)
def test_loha_is_theirs(adapter, kind):
    weight, tensors, delta = generic(adapter, kind)
    keys = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")
    given = [tensors.get(f"hada_{key}") for key in keys]
    theirs = loha.diff_weight(*given, gamma=torch.tensor(2 / 3, dtype=torch.float64))
    torch.testing.assert_close(theirs.view(weight.shape), delta)


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize(
    "adapter",
    [
        LoKr(99, factor=4),
        LoKr(1, 3.0, factor=2),
        LoKr(1, 3.0, factor=4, decompose_both=True),
        LoKr(1, 3.0, factor=2, unbalanced=True),
    ],
    ids=str,
)
def test_lokr_is_theirs(adapter, kind):
    weight, tensors, delta = generic(adapter, kind)
    keys = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    given = [tensors.get(f"lokr_{key}") for key in keys]
    if tensors.keys() == {"lokr_w1", "lokr_w2"}:
        theirs = lokr.diff_weight(*given, gamma=1.0)
    else:
        theirs = lokr.diff_weight(*given, gamma=3.0)
    torch.testing.assert_close(theirs.view(weight.shape), delta)


# -- files that LyCORIS wrote ---------------------------------------------------------------------

WRITTEN = {
    "lora": (LoConModule, {"lora_dim": 2, "alpha": 3.0}, MATRICES),
    "lora above the sides": (LoConModule, {"lora_dim": 14, "alpha": 3.0}, ["linear", "conv"]),
    "lora tucker": (LoConModule, {"lora_dim": 2, "alpha": 3.0, "use_tucker": True}, MATRICES),
    "lora rs": (LoConModule, {"lora_dim": 4, "alpha": 3.0, "rs_lora": True}, ["linear", "conv"]),
    "lora scalar": (LoConModule, {"lora_dim": 2, "alpha": 3.0, "use_scalar": True}, MATRICES),
    "dora": (LoConModule, {"lora_dim": 2, "alpha": 3.0, "weight_decompose": True}, MATRICES),
    "dora by inputs": (
        LoConModule,
        {"lora_dim": 2, "alpha": 3.0, "weight_decompose": True, "wd_on_out": False},
        MATRICES,
    ),
    "loha": (LohaModule, {"lora_dim": 2, "alpha": 3.0}, MATRICES),
    "loha tucker": (LohaModule, {"lora_dim": 2, "alpha": 3.0, "use_tucker": True}, MATRICES),
    "loha rs": (LohaModule, {"lora_dim": 2, "alpha": 3.0, "rs_lora": True}, ["linear", "conv"]),
    "loha dora": (
        LohaModule,
        {"lora_dim": 2, "alpha": 3.0, "weight_decompose": True},
        ["linear", "conv"],
    ),
    "lokr full": (LokrModule, {"lora_dim": 99, "alpha": 3.0}, MATRICES),
    "lokr": (LokrModule, {"lora_dim": 1, "alpha": 3.0, "factor": 2}, MATRICES),
    "lokr unbalanced": (
        LokrModule,
        {"lora_dim": 1, "alpha": 3.0, "factor": 2, "unbalanced_factorization": True},
        MATRICES,
    ),
    "lokr unbalanced full": (
        LokrModule,
        {"alpha": 3.0, "full_matrix": True, "factor": 4, "unbalanced_factorization": True},
        MATRICES,
    ),
    "lokr both": (LokrModule, {"lora_dim": 1, "alpha": 3.0, "decompose_both": True}, MATRICES),
    "lokr both unbalanced": (
        LokrModule,
        {
            "lora_dim": 1,
            "alpha": 3.0,
            "factor": 2,
            "decompose_both": True,
            "unbalanced_factorization": True,
        },
        MATRICES,
    ),
    "lokr one by one": (LokrModule, {"lora_dim": 99, "factor": 1}, MATRICES),
    "lokr odd split": (LokrModule, {"lora_dim": 1, "alpha": 3.0, "factor": 6}, MATRICES),
    "lokr tucker": (
        LokrModule,
        {"lora_dim": 1, "alpha": 3.0, "factor": 2, "use_tucker": True},
        MATRICES,
    ),
    "lokr dora": (
        LokrModule,
        {"lora_dim": 1, "alpha": 3.0, "factor": 2, "weight_decompose": True},
        MATRICES,
    ),
    "glora": (GLoRAModule, {"lora_dim": 2, "alpha": 3.0}, MATRICES),
    "ia3": (IA3Module, {}, MATRICES),
    "ia3 on inputs": (IA3Module, {"train_on_input": True}, MATRICES),
    "full": (FullModule, {}, MATRICES),
    "norm": (NormModule, {}, NORMS),
    "oft": (DiagOFTModule, {"lora_dim": 4}, MATRICES),
    "oft limited": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01}, ["linear", "conv"]),
    "oft rescaled": (DiagOFTModule, {"lora_dim": 4, "rescaled": True}, MATRICES),
    "boft": (ButterflyOFTModule, {"lora_dim": 6}, MATRICES),
    "boft limited": (ButterflyOFTModule, {"lora_dim": 6, "constraint": 0.01}, ["linear", "conv"]),
    "boft rescaled": (ButterflyOFTModule, {"lora_dim": 6, "rescaled": True}, ["linear", "conv"]),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, (_, _, kinds) in WRITTEN.items() for kind in kinds],
)
def test_their_files_are_read(name, kind, tmp_path):
    cls, settings, _ = WRITTEN[name]
    frozen, x = LAYERS[kind](), INPUTS[kind]
    layer = copy.deepcopy(frozen)
    module = random_module(cls, layer, **settings)
    module.apply_to()
    tensors = tensors_of(module)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    model = nn.ModuleDict({"layer": copy.deepcopy(frozen)})
    mounted, report = foreign.apply(tmp_path / "a.safetensors", {"unet": model})
    assert {line.key: line.used for line in report} == dict.fromkeys(tensors, True)
    expected = change(layer, frozen, x)
    assert relative(change(model["layer"], frozen, x), expected) < BOUND
    mounted["unet"].merge()
    assert relative(change(model["layer"], frozen, x), expected) < BOUND


# -- our files, read by LyCORIS -------------------------------------------------------------------

READ: Mapping[Adapter, list[str]] = {
    LoRA(3, 2.0): MATRICES,
    LoRA(3, 2.0, tucker=True): MATRICES,
    LoRA(3, 2.0, rank_stabilised=True): ["linear", "conv"],
    DyLoRA(4, 2.0): MATRICES,
    LoHa(3, 2.0): MATRICES,
    LoHa(3, 2.0, tucker=True): MATRICES,
    LoHa(3, 2.0, rank_stabilised=True): ["linear", "conv"],
    LoKr(99, factor=2): MATRICES,
    LoKr(99, factor=2, rank_stabilised=True): ["linear", "conv"],
    LoKr(99, factor=2, full_alpha=0.3): ["linear", "conv"],
    LoKr(1, 3.0, factor=2): MATRICES,
    LoKr(1, 3.0, factor=4, decompose_both=True): MATRICES,
    DoRA(LoRA(3, 2.0)): MATRICES,
    DoRA(LoHa(3, 2.0)): ["linear", "conv"],
    DoRA(LoKr(99, factor=2)): ["linear", "conv"],
    GLoRA(3, 2.0): MATRICES,
    GLoRA(3, 2.0, rank_stabilised=True): ["linear", "conv"],
    Native(): MATRICES,
    Native(bias=True): MATRICES,
    Native(alpha=0.3): ["linear", "conv"],
    Norm(): NORMS,
    Norm(alpha=0.3): NORMS,
    OFT(4): MATRICES,
    OFT(4, constraint=0.01): ["linear", "conv"],
    OFT(4, rescaled=True): ["linear", "conv"],
    BOFT(6): MATRICES,
    BOFT(6, constraint=0.01): ["linear", "conv"],
    BOFT(6, rescaled=True): ["linear", "conv"],
}


def product(adapter: Adapter) -> bool:
    return isinstance(adapter, Additive) and adapter.degree((12, 8)) > 1


@pytest.mark.parametrize(
    ("adapter", "kind", "scalar"),
    [
        pytest.param(adapter, kind, scalar, id=f"{adapter} {kind}{' scalar' * scalar}")
        for adapter, kinds in READ.items()
        for kind in kinds
        for scalar in (False, True)
        if not scalar or (kind == "conv" and product(adapter.inner))
    ],
)
def test_our_files_are_read(adapter, kind, scalar, tmp_path):
    frozen, x = LAYERS[kind](), INPUTS[kind]
    model = nn.ModuleDict({"layer": copy.deepcopy(frozen)})
    mounted = attach(model, adapter, ["layer"], seed=0, options=Options(use_scalar=scalar))
    rng = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor += 0.3 * torch.randn(factor.shape, generator=rng)
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {})
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    cls, parameters = get_module(tensors, "lora_unet_layer")
    layer = copy.deepcopy(frozen)
    module = make_module(cls, parameters, "lora_unet_layer", layer).eval()
    module.apply_to()
    expected = change(model["layer"], frozen, x)
    assert relative(change(layer, frozen, x), expected) < BOUND


# -- whole models ---------------------------------------------------------------------------------

NETWORKS = {
    "lora": {"algo": "lora", "network_alpha": 3.0},
    "dora": {"algo": "lora", "network_alpha": 3.0, "dora_wd": True},
    "loha": {"algo": "loha", "network_alpha": 3.0},
    "lokr": {"algo": "lokr", "network_alpha": 3.0, "factor": 4},
    "full": {"algo": "full"},
    "oft": {"algo": "diag-oft"},
    "glora": {"algo": "glora", "network_alpha": 3.0},
    "ia3": {"algo": "ia3"},
    "lora and norms": {"algo": "lora", "network_alpha": 3.0, "train_norm": True},
}


@pytest.fixture(scope="module")
def base(tiny_sd):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    return {
        "unet": UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_sd, subfolder="text_encoder"),
    }


@torch.no_grad()
def outputs(models: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    latents, context = (
        torch.randn(2, 4, 16, 16, generator=rng),
        torch.randn(2, 9, 32, generator=rng),
    )
    noise = models["unet"](latents, torch.tensor([3, 700]), context).sample
    return noise, models["text_encoder"](torch.arange(18).view(2, 9)).last_hidden_state


# As LyCORIS 1.9 had it, which trained the paper's; later ones name the time embedding twice.
FULL = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
text_encoder_target_name = []
"""


@pytest.mark.parametrize("preset", ["attn-mlp", "full"])
def test_norms_beside_an_adapter_are_those_of_their_train_norm(base, preset, tmp_path):
    """The same layers of a preset; and what we write of the UNet, LyCORIS computes."""
    (tmp_path / "full.toml").write_text(FULL)
    named = str(tmp_path / "full.toml") if preset == "full" else preset
    theirs, unet = copy.deepcopy(base), copy.deepcopy(base["unet"])
    arguments = (1.0, 4, 3.0, None, theirs["text_encoder"], theirs["unet"])
    network = create_network(*arguments, preset=named, algo="lora", train_norm=True)
    model = Model(preset=preset, train_norm=True)
    text = chosen(base["text_encoder"], "text_encoder", model, LoRA(4, 3.0))
    found = chosen(unet, "unet", model, LoRA(4, 3.0))
    modules = (*network.unet_loras, *network.text_encoder_loras)
    assert {module.lora_name for module in modules if isinstance(module, NormModule)} == {
        kohya.file_layer(part, name)
        for part, one in (("unet", found), ("text_encoder", text))
        for name in one.norms
    }
    mounted = attach(unet, LoRA(4, 3.0), found.names, seed=0, overrides=found.overrides)
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor += 0.05 * torch.randn(factor.shape, generator=rng)
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {})
    file = str(tmp_path / "a.safetensors")
    reader, _ = create_network_from_weights(1.0, file, None, None, theirs["unet"])
    reader.apply_to(None, theirs["unet"], False, True)
    reader.eval()
    given, expected, frozen = (
        outputs({**base, "unet": one})[0] for one in (theirs["unet"], unet, base["unet"])
    )
    assert relative(given - frozen, expected - frozen) < 50 * BOUND


@pytest.mark.parametrize("name", NETWORKS)
def test_files_of_whole_networks_are_read(base, name, tmp_path):
    """Everything in the file is used; by the names that LyCORIS gives the layers of each model."""
    settings = {"network_alpha": 4.0, **NETWORKS[name]}
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    alpha = settings.pop("network_alpha")
    network = create_network(
        1.0, 4, alpha, None, theirs["text_encoder"], theirs["unet"], preset="attn-mlp", **settings
    )
    network.apply_to(theirs["text_encoder"], theirs["unet"], True, True)
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for module in (*network.unet_loras, *network.text_encoder_loras):
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    network.eval()
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    mounted, report = foreign.apply(tmp_path / "a.safetensors", ours)
    assert [line for line in report if not line.used] == []
    counts = [len(network.unet_loras), len(network.text_encoder_loras)]
    assert [len(mounted[part].layers) for part in ("unet", "text_encoder")] == counts
    for given, expected, frozen in zip(outputs(ours), outputs(theirs), outputs(base), strict=True):
        # Some fifty layers after each other, each worth BOUND.
        assert relative(given - frozen, expected - frozen) < 50 * BOUND
        assert relative(expected, frozen) > 1e-3
