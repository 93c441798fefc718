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
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from lyco_lab.diffusion.targets import match
from lyco_lab.formats import kohya

EXAMPLES = [
    LoRA(rank=4, alpha=3.0),
    LoRA(rank=4, alpha=2.0, conv_rank=2, conv_alpha=5.0),
    LoHa(rank=3, alpha=2.0),
    LoKr(factor=4, alpha=0.5),
    LoKr(factor=2, rank=2, alpha=0.5),
    Native(),
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
        mounted[part] = attach(model, adapter, match(model, preset, part), seed=0)
        with torch.no_grad():
            for factor in mounted[part].parameters():
                factor += 0.1 * torch.randn(factor.shape, generator=rng)
    return models, mounted


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
    assert {type(adapter) for adapter in EXAMPLES} == set(ADAPTERS.values())
