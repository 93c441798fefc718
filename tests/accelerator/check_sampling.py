"""Drawing and scoring images on an accelerator: where tensors are, and when it waits.

Run by test_accelerator.py.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from diffusers import DDIMScheduler

from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.tlora import TLoRA
from lyco_lab.diffusion import model as families
from lyco_lab.evaluate.base import BATCH_IMAGES, Encoded
from lyco_lab.miniature import judges
from tests.accelerator.fake import Waits, accelerator, there
from tests.accelerator.stage import model, put, run_of
from tests.conftest import tiny_tokenizer
from tests.diffusion.tiny import MAKERS

PROMPTS, SEEDS = ["a circle", "a square"], [1, 2]
A_BATCH = {"images": 3}  # latents are finite, images are finite, the images


def drawn(diffusion, monkeypatch, adapter=None, steps=2) -> Counter:
    with accelerator(monkeypatch) as waited:
        put(diffusion)
        if adapter is not None:
            mounted = attach(diffusion.denoiser, adapter, ["*attn1.to_q"], seed=0)
            mounted.merge() if mounted.is_one_weight else mounted.eval()
        waited.clear()
        images = diffusion.sample(PROMPTS, SEEDS, steps=steps, guidance=3.0)
        assert images.shape == (2, diffusion.image_size, diffusion.image_size, 3)
        return Counter(waited)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2), TLoRA(rank=4, min_rank=2)], ids=str)
def test_a_batch_is_drawn_without_a_wait_in_its_steps(tiny_sd, monkeypatch, adapter):
    assert drawn(model(run_of(tiny_sd)), monkeypatch, adapter) == A_BATCH


def test_a_sampler_whose_timesteps_are_on_the_device_waits(tiny_sd, monkeypatch):
    """diffusers' own: what lyco_lab.diffusion.sampler is there for."""
    from lyco_lab.diffusion.base import Diffusion

    plain = lambda self: DDIMScheduler.from_config(dict(self.schedule))  # noqa: E731
    monkeypatch.setattr(Diffusion, "ddim", plain)
    with pytest.raises(Waits):
        drawn(model(run_of(tiny_sd)), monkeypatch)


@pytest.mark.parametrize("fault", ["item", "cpu"])
def test_a_wait_that_is_planted_into_a_step_is_seen(tiny_sd, monkeypatch, fault):
    diffusion = model(run_of(tiny_sd))
    diffusion.denoiser.conv_out.register_forward_hook(
        lambda module, inputs, output: getattr(output.sum(), fault)() and None
    )
    with pytest.raises(Waits):
        drawn(diffusion, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "sdxl", "sd3"])
def test_every_family_is_drawn_so(tmp_path, monkeypatch, family):
    MAKERS[family](tiny_tokenizer()).save_pretrained(tmp_path)
    diffusion = families.load(str(tmp_path))
    assert drawn(diffusion, monkeypatch) == A_BATCH


IMAGES = np.zeros((BATCH_IMAGES + 1, 64, 64, 3), np.uint8)  # two batches


def encoded(monkeypatch) -> Counter:
    found = judges.load()
    with accelerator(monkeypatch) as waited:
        for network in (found.clip, found.embedder, found.gram, found.oracle):
            there(network)
        looked = Encoded(IMAGES, replace(found, device="elsewhere"))
        assert looked.features_ND.shape == looked.clip_ND.shape == (len(IMAGES), 96)
        assert len(looked.grams) == 5 and set(looked.readings) == set(found.vocabulary)
        looked.judges.clip_text(["a circle"])
        return Counter(waited)


def test_encoders_wait_for_what_they_say_of_each_batch(monkeypatch):
    families_read = len(judges.VOCABULARY)
    expected = 1 + 1 + 2 * 5 + 2 * families_read  # features, CLIP's, five layers, attributes
    assert encoded(monkeypatch) == {"features": expected}


@pytest.mark.parametrize("fault", ["item", "cpu"])
def test_a_wait_that_is_planted_into_an_encoder_is_seen(monkeypatch, fault):
    from lyco_lab.miniature.networks import Gram

    features = Gram.features

    def careless(self, x):
        found = features(self, x)
        getattr(found[0].sum(), fault)()
        return found

    monkeypatch.setattr(Gram, "features", careless)
    with pytest.raises(Waits):
        encoded(monkeypatch)
