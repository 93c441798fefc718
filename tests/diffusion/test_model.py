"""Loading a Stable Diffusion: what is frozen, what images and texts become, bad folders."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch

from lyco_lab.diffusion.model import Latents, load
from lyco_lab.errors import UserError
from lyco_lab.seeds import generator


@pytest.fixture(scope="module")
def diffusion(tiny_sd):
    return load(str(tiny_sd))


@pytest.fixture(scope="module")
def images(tiny_concept):
    from PIL import Image

    return np.stack([np.asarray(Image.open(tiny_concept / f"{i:04d}.png")) for i in range(3)])


def test_everything_is_frozen_float32_and_in_evaluation_mode(diffusion):
    for module in (diffusion.unet, diffusion.text_encoder, diffusion.vae):
        assert not module.training
        for parameter in module.parameters():
            assert not parameter.requires_grad
            assert parameter.dtype == torch.float32


def test_float16_folders_are_read_as_asked(diffusion, tiny_sd, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(tiny_sd, half)
    for name, module in (
        ("unet", load(tiny_sd).unet),
        ("text_encoder", load(tiny_sd).text_encoder),
    ):
        module.half().save_pretrained(half / name)
    assert {p.dtype for p in load(half).unet.parameters()} == {torch.float32}
    loaded = load(half, torch.bfloat16)
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.vae.parameters()} == {torch.float32}


def test_latents_are_the_scaled_posterior_whatever_the_batch_size(diffusion, images):
    # Convolutions of another batch size add up in another order.
    close = functools.partial(torch.testing.assert_close, atol=1e-3, rtol=1e-3)
    latents = diffusion.encode_images(images)
    assert latents.mean_NCHW.shape == latents.std_NCHW.shape == (3, 4, 16, 16)
    for i, image in enumerate(images):
        pixels = torch.tensor(image).permute(2, 0, 1)[None] / 255 * 2 - 1
        with torch.no_grad():
            posterior = diffusion.vae.encode(pixels).latent_dist
        scaling = diffusion.vae.config.scaling_factor
        close(latents.mean_NCHW[i], scaling * posterior.mean[0])
        close(latents.std_NCHW[i], scaling * posterior.logvar[0].mul(0.5).exp())
    singly = diffusion.encode_images(images, batch_size=1)
    close(singly.mean_NCHW, latents.mean_NCHW)


def test_sampled_latents_have_the_posterior_as_their_distribution():
    latents = Latents(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 0.5))
    sample = latents.sample(generator(0, "test"))
    assert sample.mean().item() == pytest.approx(3.0, abs=0.02)
    assert sample.std().item() == pytest.approx(0.5, abs=0.02)


def test_text_is_encoded_as_the_pipeline_does_it(diffusion):
    texts = ["a red car", "", "sks circle, blue"]
    pipeline = diffusion.pipeline()
    for text, hidden in zip(texts, diffusion.encode_text(texts)["hidden"], strict=True):
        expected, _ = pipeline.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(hidden, expected[0])


def test_long_texts_are_recognised(diffusion):
    assert not diffusion.too_long("a" * 30)  # and two for start and end
    assert diffusion.too_long("a" * 31)


def test_a_sampled_image_depends_on_its_own_seed_only(diffusion):
    both = diffusion.sample(["a cat", "a dog"], [5, 6], steps=3, guidance=3.0)
    alone = diffusion.sample(["a dog"], [6], steps=3, guidance=3.0)
    assert both.shape == (2, 64, 64, 3) and both.dtype == np.uint8
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
    assert np.abs(both[1].astype(int) - both[0]).max() > 1


def test_the_image_size_is_the_latents_times_the_vae_s_factor(diffusion):
    assert diffusion.image_size == 64


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"model.path is .*nowhere.*, which does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no model of the families sd1, sd2, sd3, sdxl"):
        load(tmp_path)


def test_unreadable_weights_are_refused_with_the_part_s_name(tiny_sd, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_sd, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load unet of model.path"):
        load(broken)


def test_a_model_that_predicts_something_else_is_refused(tiny_sd, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_sd, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(UserError, match="predicts 'sample'; training needs .* 'epsilon'"):
        load(other)
