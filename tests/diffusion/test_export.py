"""From each layout: trained, exported, read again by diffusers, the images are the same."""

import dataclasses

import numpy as np
import pytest
import safetensors
import torch

from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.config import Data, Run, Train, Wandb
from lyco_lab.data.stage import prepare
from lyco_lab.diffusion import targets
from lyco_lab.diffusion.model import load
from lyco_lab.formats import kohya
from lyco_lab.record import Record
from lyco_lab.train import train

PROMPTS, SEEDS, STEPS, GUIDANCE = ["sks circle, red", "a"], [3, 4], 4, 4.0
PREFIXES = {
    "sd1": {"lora_unet_", "lora_te_text_model_"},
    "sd2": {"lora_unet_", "lora_te_text_model_"},
    "sdxl": {"lora_unet_", "lora_te1_text_model_", "lora_te2_text_model_"},
    "sd3": {"lora_transformer_", "lora_te1_text_model_", "lora_te2_text_model_"},
}


def adapted(model, tiny_concept, tmp_path, text_encoder=True):
    """The adapter file of a run of 20 steps on this model."""
    run = Run(
        name="lora",
        study="tests",
        model=dataclasses.replace(model, text_encoder=text_encoder),
        data=Data(folder=str(tiny_concept)),
        adapter={"kind": "lora", "rank": 4, "alpha": 6.0},
        train=Train(steps=20, warmup_steps=2, lr=2e-2, caption_dropout=0.2),
        wandb=Wandb(mode="disabled"),
    )
    record = Record.open(tmp_path / "runs", run)
    prepare(run, record)
    train(run, record)
    return record.path / "adapter.safetensors"


def ours(model, file=None):
    diffusion = load(model)
    if file is not None:
        for mounted in kohya.apply(file, diffusion.parts).values():
            mounted.merge()
    return diffusion.sample(PROMPTS, SEEDS, STEPS, GUIDANCE).astype(int)


def diffusers_own(folder, file):
    """The user's way: a pipeline from the folder, and the adapter loaded into it."""
    from diffusers import DiffusionPipeline

    from lyco_lab.diffusion.base import quiet

    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(str(file))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        height=64,
        width=64,
        output_type="np",
    ).images
    return (images * 255).round().astype(int)


@pytest.mark.parametrize("family", PREFIXES)
def test_a_file_has_the_layout_s_names_and_is_read_back(tiny_of, tmp_path, family):
    diffusion = load(tiny_of(family))
    before = {
        name: attach(part, LoRA(rank=2), targets.match(part, "attn-mlp", name), seed=0)
        for name, part in diffusion.parts.items()
    }
    with torch.no_grad():
        for factor in (f for m in before.values() for f in m.named_factors().values()):
            factor += 0.1
    kohya.save(tmp_path / "a.safetensors", before, diffusion.described)
    assert prefixes(tmp_path / "a.safetensors") == PREFIXES[family]
    assert not any("text_model_text_model" in key for key in keys_of(tmp_path / "a.safetensors"))
    after = kohya.apply(tmp_path / "a.safetensors", load(tiny_of(family)).parts)
    assert after.keys() == before.keys()
    for name, mounted in before.items():
        found = after[name].named_factors()
        assert found.keys() == mounted.named_factors().keys()
        for key, factor in mounted.named_factors().items():
            assert torch.equal(found[key], factor)


def test_the_names_are_those_of_sdxl_s_own_modules(tiny_of, tmp_path):
    diffusion = load(tiny_of("sdxl"))
    mounted = {
        name: attach(part, LoRA(rank=2), targets.match(part, "attn-only", name), seed=0)
        for name, part in diffusion.parts.items()
    }
    kohya.save(tmp_path / "a.safetensors", mounted, {})
    assert {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
    } <= set(keys_of(tmp_path / "a.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["folder", "safetensors", "ckpt"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_draws_the_same_images_with_the_adapter(
    model_of, tiny_of, tiny_configs, tiny_concept, tmp_path, family, layout
):
    model = model_of(family, layout)
    file = adapted(model, tiny_concept, tmp_path)
    assert prefixes(file) == PREFIXES[family]
    base, with_adapter = ours(model_of(family, "folder")), ours(model_of(family, "folder"), file)
    assert np.abs(with_adapter - base).mean() > 5  # what it changes is more than the last bits
    assert np.abs(diffusers_own(tiny_of(family), file) - with_adapter).max() <= 1


@pytest.mark.slow
def test_a_transformer_is_trained_and_its_file_read_again(
    model_of, tiny_of, tiny_concept, tmp_path
):
    model = model_of("sd3", "folder")
    file = adapted(model, tiny_concept, tmp_path)
    assert prefixes(file) == PREFIXES["sd3"]
    assert np.abs(ours(model, file) - ours(model)).mean() > 5


def prefixes(file):
    """What the keys of the file begin with; every key begins with one of them."""
    known = set.union(*PREFIXES.values())
    found = [{prefix for prefix in known if key.startswith(prefix)} for key in keys_of(file)]
    assert all(len(one) == 1 for one in found)
    return set.union(*found)


def keys_of(file):
    with safetensors.safe_open(file, framework="pt") as opened:
        return list(opened.keys())
