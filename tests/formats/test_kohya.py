"""kohya files: exact round trips, the layout that others read, and lycoris-lora reading ours."""

import copy
import json
import logging
import os
import re

import pytest
import safetensors.torch
import torch
from torch import nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.adapted_layer import NORMS
from lyco_lab.adapters.boft import BOFT
from lyco_lab.adapters.dora import DoRA
from lyco_lab.adapters.dylora import DyLoRA
from lyco_lab.adapters.glora import GLoRA
from lyco_lab.adapters.ia3 import IA3
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.norm import Norm
from lyco_lab.adapters.oft import OFT
from lyco_lab.adapters.options import Options, Override
from lyco_lab.adapters.tlora import TLoRA
from lyco_lab.diffusion.targets import match
from lyco_lab.formats import kohya

EXAMPLES = [
    LoRA(rank=4, alpha=3.0),
    LoRA(rank=4, alpha=2.0, conv_rank=2, conv_alpha=5.0),
    LoHa(rank=3, alpha=2.0),
    LoKr(factor=4, alpha=0.5),
    LoKr(factor=2, rank=2, alpha=0.5),
    Native(),
    DoRA(LoRA(rank=4, alpha=3.0)),
    GLoRA(rank=4, alpha=3.0),
    Norm(),
    OFT(block_size=4),
]
# Saved and read on a small model. Whether LyCORIS reads them too, tests/oracles/ says.
OTHERS = [
    LoRA(rank=4, alpha=3.0, conv_rank=2, tucker=True, rank_stabilised=True),
    LoHa(rank=3, alpha=2.0, conv_rank=2, tucker=True),
    LoKr(factor=2, rank=1, alpha=0.5, tucker=True),
    LoKr(factor=4, rank=1, alpha=0.5, decompose_both=True, unbalanced=True),
    DyLoRA(rank=4, alpha=3.0, block_size=2),
    DoRA(LoKr(factor=4)),
    DoRA(LoRA(rank=4, alpha=3.0), axis="in", detached=True),
    Native(bias=True),
    OFT(block_size=4, constraint=0.01, rescaled=True),
    BOFT(block_size=6),
    IA3(),
    IA3(on_input=True),
    TLoRA(rank=3, alpha=2.0),
    Native(alpha=0.25, bias=True),
    IA3(alpha=0.25),
    LoKr(factor=2, full_alpha=0.25),
]
every_example = pytest.mark.parametrize("adapter", EXAMPLES, ids=str)


@pytest.fixture(scope="module")
def base(tiny_sd):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    return {
        "unet": UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_sd, subfolder="text_encoder"),
    }


def adapted(base, adapter, preset):
    """Fresh models with the adapter mounted and moved away from its start."""
    models = copy.deepcopy(base)
    rng = torch.Generator().manual_seed(0)
    mounted = {}
    for part, model in models.items():
        names = match(model, preset, part)
        if adapter.takes == "norm":
            names = [name for name, layer in model.named_modules() if isinstance(layer, NORMS)]
        mounted[part] = attach(model, adapter, names, seed=0)
        moved(mounted[part], rng)
    return models, mounted


@torch.no_grad()
def moved(mounted, rng):
    for factor in mounted.parameters():
        factor += 0.1 * torch.randn(factor.shape, generator=rng)
    return mounted


@torch.no_grad()
def outputs(models):
    rng = torch.Generator().manual_seed(1)
    latents, context = (
        torch.randn(2, 4, 16, 16, generator=rng),
        torch.randn(2, 9, 32, generator=rng),
    )
    noise = models["unet"](latents, torch.tensor([3, 700]), context).sample
    text = models["text_encoder"](torch.arange(18).view(2, 9)).last_hidden_state
    return noise, text


@every_example
def test_a_file_gives_the_same_model_back(base, adapter, tmp_path):
    models, mounted = adapted(base, adapter, "full")
    kohya.save(tmp_path / "a.safetensors", mounted, {"ss_seed": "7"})
    again = copy.deepcopy(base)
    loaded = kohya.apply(tmp_path / "a.safetensors", again)
    for part in models:
        assert loaded[part].adapter == adapter
        assert loaded[part].state_dict().keys() == mounted[part].state_dict().keys()
        for name, factor in mounted[part].state_dict().items():
            assert torch.equal(loaded[part].state_dict()[name], factor)
    for ours, theirs in zip(outputs(models), outputs(again), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(outputs(models)[0], outputs(base)[0])
    assert not torch.equal(outputs(models)[1], outputs(base)[1])


def test_same_factors_same_bytes(base, tmp_path):
    path = tmp_path / "a.safetensors"
    contents = set()
    for _ in range(6):
        _, mounted = adapted(base, LoRA(), "attn-mlp")
        kohya.save(path, mounted, {"ss_seed": "7", "ss_steps": "300", "ss_output_name": "naïve"})
        contents.add(path.read_bytes())
    assert len(contents) == 1
    _, metadata = kohya.load(path)
    assert metadata["ss_output_name"] == "naïve"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_merged_adapter_is_saved_as_it_trained(base, tmp_path):
    _, mounted = adapted(base, LoRA(), "attn-mlp")
    for name in ("mounted", "merged"):
        kohya.save(tmp_path / name, mounted, {})
        for one in mounted.values():
            if name == "mounted":
                one.merge()
    assert (tmp_path / "mounted").read_bytes() == (tmp_path / "merged").read_bytes()


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_keys_are_those_that_others_read(base, wrapped, tmp_path):
    """Also where the text encoder's class has no `text_model`, which the layout spells out."""
    models = copy.deepcopy(base)
    if wrapped:
        models["text_encoder"] = nn.ModuleDict({"text_model": models["text_encoder"]})
    mounted = {
        part: attach(model, LoRA(rank=2), match(model, "attn-mlp", part), seed=0)
        for part, model in models.items()
    }
    kohya.save(tmp_path / "a.safetensors", mounted, {})
    keys = safetensors.torch.load_file(tmp_path / "a.safetensors").keys()
    for key in (
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te_text_model_encoder_layers_1_mlp_fc2.alpha",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_down.weight",
    ):
        assert key in keys
    assert all(re.match(r"lora_(unet|te_text_model_encoder)_\w+\.[\w.]+$", key) for key in keys)


@pytest.mark.parametrize(
    ("adapter", "shapes"),
    [
        (
            LoRA(rank=2, alpha=3.0),
            {"lora_down.weight": (2, 16, 3, 3), "lora_up.weight": (24, 2, 1, 1), "alpha": 3.0},
        ),
        (
            LoHa(rank=2, alpha=3.0),
            {"hada_w1_a": (24, 2), "hada_w1_b": (2, 144)}
            | {"hada_w2_a": (24, 2), "hada_w2_b": (2, 144), "alpha": 3.0},
        ),
        (LoKr(factor=4, rank=99), {"lokr_w1": (4, 4), "lokr_w2": (6, 4, 3, 3), "alpha": 99.0}),
        (
            LoKr(factor=4, rank=2, alpha=3.0),
            {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 36), "alpha": 3.0},
        ),
        (Native(), {"diff": (24, 16, 3, 3)}),
    ],
    ids=str,
)
def test_tensors_have_the_shapes_of_the_layout(adapter, shapes, tmp_path):
    model = nn.ModuleDict({"conv": nn.Conv2d(16, 24, 3)})
    mounted = attach(model, adapter, ["conv"], seed=0)
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {})
    parts, _ = kohya.load(tmp_path / "a.safetensors")
    written = {
        suffix: tensor.item() if suffix == "alpha" else tuple(tensor.shape)
        for suffix, tensor in parts["unet"]["lora_unet_conv"].items()
    }
    assert written == shapes
    assert all(tensor.dtype == torch.float32 for tensor in parts["unet"]["lora_unet_conv"].values())


def test_metadata_hold_what_readers_look_for(base, tmp_path):
    adapter = LoKr(factor=4, rank=2, alpha=0.5, conv_rank=3)
    _, mounted = adapted(base, adapter, "attn-mlp")
    kohya.save(tmp_path / "a.safetensors", mounted, {"ss_seed": "7"})
    _, metadata = kohya.load(tmp_path / "a.safetensors")
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "0.5")
    assert metadata["ss_seed"] == "7"
    arguments = json.loads(metadata["ss_network_args"])
    assert (
        arguments.items() >= {"algo": "lokr", "factor": 4, "conv_dim": 3, "conv_alpha": 0.5}.items()
    )
    described = json.loads(metadata["lyco_lab.adapter"])
    assert described.keys() == {"unet", "text_encoder"}
    assert described["unet"].pop("kind") == "lokr"
    assert LoKr(**described["unet"]) == adapter


@pytest.fixture(scope="module")
def lycoris():
    from lycoris.config import PRESET
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
    from lycoris.logging import logger

    logger.setLevel(logging.ERROR)
    # Its loader first builds a network over the whole model; by its default preset that fails on
    # diffusers' UNet, whose time embedding it counts twice.
    LycorisNetworkKohya.apply_preset(PRESET["attn-mlp"])

    def load(path, models):
        """Its network on these models, whose outputs it changes; how many layers it adapts."""
        wrapper = nn.ModuleDict({"text_model": models["text_encoder"]})  # the names of the layout
        network, _ = create_network_from_weights(1.0, str(path), None, wrapper, models["unet"])
        network.apply_to(wrapper, models["unet"], True, True)
        return len(network.unet_loras), len(network.text_encoder_loras)

    return load


@every_example
def test_lycoris_gives_equal_outputs(base, lycoris, adapter, tmp_path):
    models, mounted = adapted(base, adapter, "full")
    kohya.save(tmp_path / "a.safetensors", mounted, {})
    theirs = copy.deepcopy(base)
    counts = lycoris(tmp_path / "a.safetensors", theirs)
    assert counts == tuple(len(one.layers) for one in mounted.values())
    for ours, other in zip(outputs(models), outputs(theirs), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_every_adapter_is_among_the_examples():
    assert {type(adapter) for adapter in [*EXAMPLES, *OTHERS]} == set(ADAPTERS.values())


def same(first, second):
    """Whether both hold the same adapters, options and factors."""
    assert list(first.layers) == list(second.layers)
    for name in first.layers:
        assert first.adapter_of(name) == second.adapter_of(name)
        assert first.options_of(name) == second.options_of(name)
    for name, factor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], factor), name


def test_layers_may_differ_and_options_come_back(base, tmp_path):
    overrides = {
        "*attn2*": Override(rank=2, alpha=7.0),
        "*.to_out.0": Override(adapter=DoRA(LoHa(rank=3), axis="in")),
        "*attn1.to_k": Override(adapter=LoKr(factor=4, rank=1, alpha=0.5)),
    }
    options = Options(dropout=0.1, rank_dropout=0.2, module_dropout=0.3)
    _, mounted = adapted(base, LoRA(rank=4, alpha=3.0), "attn-only")
    unet = copy.deepcopy(base["unet"])
    names = match(unet, "attn-only", "unet")
    mounted["unet"] = moved(
        attach(unet, LoRA(rank=4), names, seed=0, overrides=overrides, options=options),
        torch.Generator().manual_seed(2),
    )
    kinds = {mounted["unet"].adapter_of(name) for name in names}
    assert len(kinds) == 4
    path = tmp_path / "a.safetensors"
    kohya.save(path, mounted, {})
    loaded = kohya.apply(path, copy.deepcopy(base))
    for part in mounted:
        same(mounted[part], loaded[part])
    _, metadata = kohya.load(path)
    assert json.loads(metadata["lyco_lab.layers"]).keys() == {"unet"}
    assert len(json.loads(metadata["lyco_lab.layers"])["unet"]) == 3
    assert json.loads(metadata["lyco_lab.options"]).keys() == {"unet"}
    first = path.read_bytes()
    kohya.save(path, loaded, {})
    assert path.read_bytes() == first


@pytest.mark.parametrize("adapter", OTHERS, ids=str)
def test_every_adapter_comes_back(adapter, tmp_path):
    rng = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(8, 12), "conv": nn.Conv2d(8, 12, 3)})
    fresh = copy.deepcopy(model)
    mounted = moved(attach(model, adapter, ["linear", "conv"], seed=0), rng)
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {})
    same(mounted, kohya.apply(tmp_path / "a.safetensors", {"unet": fresh})["unet"])
    for name, shape in {"linear": (3, 8), "conv": (2, 8, 5, 6)}.items():
        x = torch.randn(shape, generator=rng)
        assert torch.equal(model[name](x), fresh[name](x))


LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), LoRA(rank=2), (3, 8)),
    "embedding": (lambda: nn.Embedding(9, 6), LoHa(rank=2), None),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3), LoKr(factor=4), (2, 8, 9)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), LoRA(rank=2, tucker=True), (2, 8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), LoHa(rank=2, tucker=True), (1, 4, 3, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm((4, 5)), Norm(), (3, 4, 5)),
    "rms norm": (lambda: nn.RMSNorm(8), Norm(), (3, 8)),
    "group norm": (lambda: nn.GroupNorm(2, 8), Norm(), (3, 8, 4)),
    "biased": (lambda: nn.Linear(8, 12), Native(bias=True), (3, 8)),
    "no bias": (lambda: nn.Linear(8, 12, bias=False), Native(bias=True), (3, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layers_of_every_kind_and_precision(kind, dtype, tmp_path):
    make, adapter, shape = LAYERS[kind]
    rng = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"one": make().to(dtype)})
    x = torch.randn(shape, generator=rng).to(dtype) if shape else torch.tensor([[1, 8, 0]])
    fresh = copy.deepcopy(model)
    mounted = moved(attach(model, adapter, ["one"], seed=0), rng)
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {})
    loaded = kohya.apply(tmp_path / "a.safetensors", {"unet": fresh})
    same(mounted, loaded["unet"])
    assert torch.equal(model["one"](x), fresh["one"](x))
    suffixes = kohya.load(tmp_path / "a.safetensors")[0]["unet"]["lora_unet_one"].keys()
    if isinstance(adapter, Norm):
        assert suffixes == {"w_norm"} | ({"b_norm"} if kind != "rms norm" else set())
    if isinstance(adapter, Native):
        assert suffixes == {"diff"} | ({"diff_b"} if kind == "biased" else set())


def test_attention_whose_projections_are_one_weight(tmp_path):
    rng = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"one": nn.MultiheadAttention(8, 2, batch_first=True)})
    fresh = copy.deepcopy(model)
    mounted = moved(attach(model, LoRA(rank=2), ["one", "one.out_proj"], seed=0), rng)
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {})
    same(mounted, kohya.apply(tmp_path / "a.safetensors", {"unet": fresh})["unet"])
    x = torch.randn(2, 3, 8, generator=rng)
    assert torch.equal(model["one"](x, x, x)[0], fresh["one"](x, x, x)[0])


@pytest.mark.parametrize(
    "adapter",
    [LoRA(2), LoHa(2), LoKr(rank=1, alpha=0.5, factor=2), DoRA(LoRA(2))],
    ids=lambda adapter: type(adapter).__name__,
)
def test_a_trained_scalar_is_in_the_factors_of_the_file(adapter, tmp_path):
    """So that every reader has the update, and none needs to know of the scalar."""
    model = nn.ModuleDict({"one": nn.Linear(8, 12)})
    fresh = copy.deepcopy(model)
    options = Options(use_scalar=True)
    mounted = attach(model, adapter, ["one"], seed=0, options=options)
    moved(mounted, torch.Generator().manual_seed(0))
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {})
    loaded = kohya.apply(tmp_path / "a.safetensors", {"unet": fresh})["unet"]
    assert mounted.factors("one")["scalar"] != 1
    assert loaded.factors("one")["scalar"] == 1
    assert loaded.options_of("one") == options
    assert torch.equal(loaded.delta("one"), mounted.delta("one"))
    parts, _ = kohya.load(tmp_path / "a.safetensors")
    assert not any("scalar" in suffix for suffix in parts["unet"]["lora_unet_one"])


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("rank", [1, 4])
def test_gamma_is_alpha_over_rank_in_every_file(rank, stabilised, tmp_path):
    model = nn.ModuleDict({"one": nn.Linear(8, 12)})
    adapter = LoRA(rank=rank, alpha=3.0, rank_stabilised=stabilised)
    mounted = attach(model, adapter, ["one"], seed=0)
    moved(mounted, torch.Generator().manual_seed(0))
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {})
    layer = kohya.load(tmp_path / "a.safetensors")[0]["unet"]["lora_unet_one"]
    product = layer["lora_up.weight"] @ layer["lora_down.weight"]
    gamma = layer["alpha"] / len(layer["lora_down.weight"])
    torch.testing.assert_close(gamma * product, mounted.delta("one"))
    assert gamma == pytest.approx(3 / (rank**0.5 if stabilised else rank))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smaller_files_hold_rounded_factors(dtype, tmp_path):
    """The alpha stays as it is: rank 100000 asks for full blocks, and is no float16."""
    model = nn.ModuleDict({"one": nn.Linear(8, 12)})
    fresh = copy.deepcopy(model)
    mounted = attach(model, LoKr(rank=100000, factor=4), ["one"], seed=0)
    moved(mounted, torch.Generator().manual_seed(0))
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {}, dtype=dtype)
    parts, _ = kohya.load(tmp_path / "a.safetensors")
    kinds = {suffix: tensor.dtype for suffix, tensor in parts["unet"]["lora_unet_one"].items()}
    assert kinds == {"lokr_w1": dtype, "lokr_w2": dtype, "alpha": torch.float32}
    assert parts["unet"]["lora_unet_one"]["alpha"] == 100000
    loaded = kohya.apply(tmp_path / "a.safetensors", {"unet": fresh})["unet"]
    for name, factor in mounted.factors("one").items():
        given = loaded.factors("one")[name]
        assert given.dtype == torch.float32
        assert torch.equal(given, factor.to(dtype).float())


def test_metadata_of_an_adapter_around_another(tmp_path):
    model = nn.ModuleDict({"one": nn.Linear(8, 12)})
    adapter = DoRA(LoRA(rank=3, alpha=2.0, rank_stabilised=True), axis="in")
    mounted = attach(model, adapter, ["one"], seed=0, options=Options(dropout=0.1))
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {})
    _, metadata = kohya.load(tmp_path / "a.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "2.0")
    arguments = json.loads(metadata["ss_network_args"])
    expected = {"algo": "lora", "dora_wd": True, "wd_on_output": False, "rs_lora": True}
    assert arguments.items() >= (expected | {"dropout": 0.1}).items()
