"""A random Stable Diffusion small enough to train in a second, and a concept to train it on."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tests.strategies  # noqa: F401  # its Hypothesis profile, for every test

TRIGGER, CLASS = "sks", "circle"


torch.set_num_threads(1)  # a module's fixtures are made before a test's

# A shell without job control lets what it starts in the background ignore Ctrl-C, and so would
# every process that a test begins.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread():
    """The machine's other work decides how fast two threads are; and one adds up in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A folder laid out as the miniature's: 64x64 images, 16x16x4 latents; random weights.

    Small as it is, its time goes into calling operations, not into computing them: so it has a
    block less than the miniature.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(
                sample_size=64,
                block_out_channels=(8, 16, 16),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                norm_num_groups=8,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=32,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(16, 24),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                norm_num_groups=8,
                cross_attention_dim=32,
                attention_head_dim=4,  # heads, in spite of its name
            ),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    folder = tmp_path_factory.mktemp("tiny_sd")
    pipeline.save_pretrained(folder)
    return folder


def tiny_tokenizer():
    """A genuine CLIPTokenizer whose words are single characters."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=32
    )


@pytest.fixture(scope="session")
def tiny_concept(tmp_path_factory) -> Path:
    """Six 64x64 images of coloured circles, their captions and manifest. Copy it to change it."""
    folder = tmp_path_factory.mktemp("concept")
    y, x = np.mgrid[:64, :64]
    colours = {"red": (220, 40, 30), "green": (40, 180, 60), "blue": (40, 70, 220)}
    lines = []
    for index in range(6):
        name, colour = list(colours.items())[index % 3]
        inside = (x - 20 - 4 * index) ** 2 + (y - 32) ** 2 < (10 + 2 * index) ** 2
        image = np.where(inside[..., None], np.uint8(colour), np.uint8(235))
        Image.fromarray(image).save(folder / f"{index:04d}.png")
        caption = f"{TRIGGER} {CLASS}, {name}"
        (folder / f"{index:04d}.txt").write_text(caption + "\n")
        lines.append(
            {
                "file": f"{index:04d}.png",
                "caption": caption,
                "attributes": {"colour": name},
                "concept": "circle",
                "subclass": "big" if index > 3 else "small",
                "category": "toy",
                "repeats": 2,
                "trigger": TRIGGER,
                "class_word": CLASS,
            }
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
