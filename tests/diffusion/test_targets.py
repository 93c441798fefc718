"""Presets on a small model, name by name; test_sd15_sizes.py has them on a full-size one."""

import pytest
from torch import nn

from lyco_lab.adapters.dora import DoRA
from lyco_lab.adapters.geometry import NORMS
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.norm import Norm
from lyco_lab.config import Model
from lyco_lab.diffusion.targets import PRESETS, chosen, match
from lyco_lab.errors import UserError


@pytest.fixture(scope="module")
def models(tiny_sd):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    return {
        "unet": UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_sd, subfolder="text_encoder"),
    }


def kinds(models, preset, part):
    """What a preset matches, without the numbers of blocks and layers."""
    return {
        ".".join(piece for piece in name.split(".") if not piece.isdigit())
        for name in match(models[part], preset, part)
    }


def ends(names):
    return {name.split("transformer_blocks.")[-1] for name in names}


ATTENTION = {
    f"{attn}.{to}" for attn in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out")
}
FEED_FORWARD = {"ff.net.proj", "ff.net"}
CLIP_ATTENTION = {f"encoder.layers.self_attn.{to}_proj" for to in ("q", "k", "v", "out")}
CLIP_MLP = {"encoder.layers.mlp.fc1", "encoder.layers.mlp.fc2"}


def test_attention_only(models):
    assert ends(kinds(models, "attn-only", "unet")) == ATTENTION
    assert kinds(models, "attn-only", "text_encoder") == CLIP_ATTENTION


def test_whole_transformer_blocks(models):
    names = ends(kinds(models, "attn-mlp", "unet"))
    projections = {name for name in names if name.endswith(("proj_in", "proj_out"))}
    assert names - projections == ATTENTION | FEED_FORWARD
    assert {name.split(".")[-1] for name in projections} == {"proj_in", "proj_out"}
    assert kinds(models, "attn-mlp", "text_encoder") == CLIP_ATTENTION | CLIP_MLP


def test_full_is_every_layer_of_the_unet(models):
    every = [
        name
        for name, module in models["unet"].named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    assert match(models["unet"], "full", "unet") == every
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= set(every)
    assert kinds(models, "full", "text_encoder") == CLIP_ATTENTION | CLIP_MLP


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_each_preset_contains_the_one_before(models, part):
    matched = [match(models[part], preset, part) for preset in PRESETS]
    for smaller, larger in zip(matched, matched[1:], strict=False):
        assert set(smaller) <= set(larger)
        assert smaller == [name for name in larger if name in smaller]  # in the model's order


@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapted_model_still_matches(models, preset):
    names = match(models["unet"], preset, "unet")
    mounted = attach(models["unet"], LoRA(rank=1), names, seed=0)
    assert match(models["unet"], preset, "unet") == names
    mounted.detach()


def test_the_wrapper_of_older_text_encoders_is_no_obstacle(models):
    wrapped = nn.ModuleDict({"text_model": models["text_encoder"]})
    names = match(models["text_encoder"], "attn-mlp", "text_encoder")
    assert match(wrapped, "attn-mlp", "text_encoder") == [f"text_model.{name}" for name in names]


@pytest.mark.parametrize(
    ("preset", "part", "words"),
    [
        ("attn_only", "unet", r"unknown preset 'attn_only' \(did you mean 'attn-only'\?\)"),
        ("full", "vae", "unknown part 'vae'.*one of unet, transformer, text_encoder"),
        (
            "attn-only",
            "text_encoder",
            "matches no layer of the text_encoder.*none of CLIPAttention",
        ),
        ("attn-mlp", "text_encoder", "matches no layer"),
    ],
)
def test_refuses_what_matches_nothing(models, preset, part, words):
    with pytest.raises(ValueError, match=words):
        match(models["unet"], preset, part)


class ResnetBlock2D(nn.ModuleDict):
    """By its name a block of preset full."""


def block(**layers):
    return nn.ModuleDict({"block": ResnetBlock2D(layers)})


FULL = Model(preset="full", train_norm=True)


@pytest.mark.parametrize("adapter", [LoRA(rank=8, alpha=2.0), DoRA(of=LoHa(rank=6))], ids=str)
def test_a_rank_is_cut_down_to_what_a_narrow_layer_allows(adapter):
    model = block(wide=nn.Linear(16, 16), narrow=nn.Conv2d(16, 4, 3))
    found = chosen(model, "unet", Model(preset="full"), adapter)
    (name, override), *others = found.narrowed.items()
    assert (name, others, found.overrides) == ("block.narrow", [], found.narrowed)
    fitted, shape = override.adapter.inner, (4, 16, 3, 3)
    assert fitted.rank_of(shape) == 4
    assert fitted.gamma(shape) == adapter.inner.gamma(shape)
    attach(model, adapter, found.names, seed=0, overrides=found.overrides)


@pytest.mark.parametrize("adapter", [LoKr(), DoRA(of=LoKr()), Native()], ids=str)
def test_what_has_no_rank_is_not_narrowed(adapter):
    model = block(wide=nn.Linear(16, 16), narrow=nn.Conv2d(16, 4, 3))
    assert not chosen(model, "unet", Model(preset="full"), adapter).overrides


def test_norms_that_scale_are_beside_the_adapter():
    norms = {
        "layer": nn.LayerNorm(8, bias=False), "group": nn.GroupNorm(2, 8), "rms": nn.RMSNorm(8),
        "plain": nn.LayerNorm(8, elementwise_affine=False),
    }  # fmt: skip
    model = nn.ModuleDict({"block": ResnetBlock2D({"l": nn.Linear(8, 8), **norms}),
                           "conv_norm_out": nn.GroupNorm(2, 8)})  # fmt: skip
    found = chosen(model, "unet", FULL, Native(alpha=0.5))
    names = ["block.layer", "block.group", "block.rms"]
    assert list(found.norms) == names and found.names == ["block.l", *names]
    mounted = attach(model, Native(alpha=0.5), found.names, seed=0, overrides=found.overrides)
    assert {mounted.adapter_of(name) for name in names} == {Norm()}
    assert mounted.num_params == 64 + 8 + 16 + 8
    mounted.detach()
    assert not chosen(model, "unet", Model(preset="full"), Native()).norms


def test_the_norms_of_each_preset(models):
    unet = {
        preset: chosen(models["unet"], "unet", Model(preset=preset, train_norm=True), LoRA())
        for preset in ("attn-mlp", "full")
    }
    within = {name.rpartition(".")[2] for name in unet["attn-mlp"].norms}
    assert within == {"norm", "norm1", "norm2", "norm3"}
    added = unet["full"].norms.keys() - unet["attn-mlp"].norms.keys()
    assert added and all(".resnets." in name for name in added)
    every = {n for n, m in models["unet"].named_modules() if isinstance(m, NORMS)}
    assert every - unet["full"].norms.keys() == {"conv_norm_out"}
    for preset in PRESETS:
        found = chosen(
            models["text_encoder"], "text_encoder", Model(preset=preset, train_norm=True), LoRA()
        )
        assert not found.norms  # they lie around CLIP's attention and MLP


def test_norms_that_are_not_there_are_an_error(models):
    asked = Model(preset="attn-only", train_norm=True)
    with pytest.raises(UserError, match="no norm layer of the unet .* preset 'attn-only'"):
        chosen(models["unet"], "unet", asked, LoRA())
    with pytest.raises(UserError, match="adapter.kind is 'norm'.*model.train_norm trains"):
        chosen(models["unet"], "unet", FULL, Norm())
