"""What holds for every family: texts as its pipeline reads them, training steps, images."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.tlora import TLoRA
from lyco_lab.config import Model
from lyco_lab.diffusion import targets
from lyco_lab.diffusion.families import FAMILIES
from lyco_lab.diffusion.model import Sizes, fingerprint, load, sound
from lyco_lab.diffusion.skeleton import image_side, parts, skeleton
from lyco_lab.errors import UserError
from lyco_lab.seeds import generator
from tests.diffusion.tiny import MAKERS

every_family = pytest.mark.parametrize("family", MAKERS)
WHOLE = {
    "sd1": ["unet", "text_encoder"],
    "sd2": ["unet", "text_encoder"],
    "sdxl": ["unet", "text_encoder", "text_encoder_2"],
    "sd3": ["transformer", "text_encoder", "text_encoder_2"],
    "sd3-t5": ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3"],
}
TEXTS = ["a red cat", "dogs, and more dogs"]


def of_texts(diffusion, texts=TEXTS):
    return diffusion.condition(diffusion.encode_text(texts), Sizes.whole(64, 64, len(texts)))


@every_family
def test_a_folder_is_recognised_and_its_parts_are_found(tiny_of, family):
    folder = tiny_of(family)
    diffusion = load(folder)
    assert type(diffusion) is FAMILIES[family.removesuffix("-t5")]
    assert list(diffusion.parts) == list(parts(folder, True)) == WHOLE[family]
    assert list(diffusion.trained(False)) == list(parts(folder, False)) == WHOLE[family][:1]
    assert diffusion.denoiser is diffusion.parts[WHOLE[family][0]]
    assert diffusion.image_size == image_side(folder) == 64
    assert diffusion.objective.name == (
        {"sd2": "v_prediction"}.get(family, "flow" if "sd3" in family else "epsilon")
    )


def test_model_family_is_what_the_model_has_to_be(tiny_of):
    for family in FAMILIES:
        assert load(Model(path=str(tiny_of(family)), family=family)) is not None
    with pytest.raises(UserError, match="model.family is 'sdxl', but .* of the family 'sd1'"):
        skeleton(Model(path=str(tiny_of("sd1")), family="sdxl"), "unet")
    with pytest.raises(UserError, match=r"is 'sdx', needs one of sd1.*\(did you mean 'sdxl'\?\)"):
        load(Model(path=str(tiny_of("sd1")), family="sdx"))


@every_family
def test_everything_is_frozen_in_its_precision_and_in_evaluation_mode(tiny_of, family):
    diffusion = load(tiny_of(family), torch.bfloat16)
    for module in (*diffusion.parts.values(), diffusion.vae):
        expected = torch.float32 if module is diffusion.vae else torch.bfloat16
        assert not module.training
        for parameter in module.parameters():
            assert not parameter.requires_grad and parameter.dtype == expected


@every_family
def test_skeletons_have_the_networks_shapes(tiny_of, family):
    for name, part in load(tiny_of(family)).parts.items():
        shapes = {key: tensor.shape for key, tensor in part.state_dict().items()}
        made = skeleton(tiny_of(family), name).state_dict()
        assert {key: tensor.shape for key, tensor in made.items()} == shapes


@every_family
def test_texts_are_read_as_the_pipeline_reads_them(tiny_of, family):
    diffusion = load(tiny_of(family))
    pipeline = diffusion.pipeline()
    others = {"sdxl": ["prompt_2"], "sd3": ["prompt_2", "prompt_3"]}.get(family[:4].strip("-"), [])
    said = pipeline.encode_prompt(
        prompt=TEXTS,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        **dict.fromkeys(others),
    )
    hidden, empty, *pooled = said
    for texts, expected in ((TEXTS, said[::2]), (["", ""], said[1::2])):
        found = of_texts(diffusion, texts)
        torch.testing.assert_close(found["hidden"], expected[0])
        if pooled:
            torch.testing.assert_close(found["pooled"], expected[1])
    assert ("pooled" in found) == bool(pooled)
    if family == "sdxl":
        assert not empty.any() and not found["pooled"].any()
    assert hidden.std() > 0.1


def test_an_empty_text_is_zero_only_where_the_model_says_so(tiny_of):
    text = load(tiny_of("sdxl", empty_is_zero=False)).encode_text(["", "a"])
    assert text["hidden"][0].any() and text["pooled"][0].any()
    text = load(tiny_of("sdxl")).encode_text(["", "a"])
    assert not text["hidden"][0].any() and not text["pooled"][0].any()
    assert text["hidden"][1].any() and text["pooled"][1].any()


@every_family
def test_tokens_are_read_later_as_texts_are_at_once(tiny_of, family):
    diffusion = load(tiny_of(family))
    sizes = Sizes.whole(64, 64, len(TEXTS))
    at_once = of_texts(diffusion)
    later = diffusion.condition(diffusion.tokenize(TEXTS), sizes)
    assert at_once.keys() == later.keys()
    for name, rows in at_once.items():
        torch.testing.assert_close(later[name], rows)
        assert len(rows) == len(TEXTS)


def test_sdxl_is_told_the_sizes_as_its_pipeline_tells_them(tiny_of):
    diffusion = load(tiny_of("sdxl"))
    sizes = Sizes(*(torch.tensor(rows) for rows in ([[80, 100]], [[3, 5]], [[64, 72]])))
    time_ids = diffusion.condition(diffusion.encode_text(["a"]), sizes)["time_ids"]
    expected = diffusion.pipeline()._get_add_time_ids(
        (80, 100), (3, 5), (64, 72), torch.float32, text_encoder_projection_dim=24
    )
    assert torch.equal(time_ids, expected)


def step(diffusion, seed=0):
    """Noisy latents, what is to be predicted, timesteps."""
    rng = generator(seed, "test")
    z, e = torch.randn(2, 2, 4, 16, 16, generator=rng)
    t = torch.randint(diffusion.objective.timesteps, (2,), generator=rng)
    return diffusion.objective.noisy(z, e, t), diffusion.objective.target(z, e, t), t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_family
def test_predictions_are_float32_and_see_all_that_they_are_told(tiny_of, family, dtype):
    diffusion = load(tiny_of(family), dtype)
    noisy, _, t = step(diffusion)
    conditioning = of_texts(diffusion)
    before = diffusion.predict(noisy, t, conditioning)
    assert before.shape == noisy.shape and before.dtype == torch.float32
    for name, rows in conditioning.items():
        other = diffusion.predict(noisy, t, {**conditioning, name: rows + 1})
        assert (other - before).abs().max() > 1e-4, name
    assert (diffusion.predict(noisy, t // 2, conditioning) - before).abs().max() > 1e-4


@every_family
def test_a_step_moves_every_part(tiny_of, family):
    """The loss falls, and each part that is adapted has had a share in it."""
    diffusion = load(tiny_of(family))
    mounted = {
        name: attach(part, LoRA(rank=2), targets.match(part, "attn-mlp", name), seed=0)
        for name, part in diffusion.parts.items()
    }
    factors = [p for m in mounted.values() for p in m.named_factors().values()]
    optimizer = torch.optim.Adam(factors, lr=1e-2)
    noisy, target, t = step(diffusion)
    losses = []
    for _ in range(8):
        told = diffusion.condition(diffusion.tokenize(TEXTS), Sizes.whole(64, 64, 2))
        loss = F.mse_loss(diffusion.predict(noisy, t, told), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for m in mounted.values():
        assert max(m.norms().values()) > 0


def test_adapters_that_depend_on_the_timestep_find_it_in_a_transformer(tiny_of):
    diffusion = load(tiny_of("sd3"))
    names = targets.match(diffusion.transformer, "attn-only", "transformer")
    mounted = attach(diffusion.transformer, TLoRA(rank=4, min_rank=1), names, seed=0)
    noisy, _, t = step(diffusion)
    assert torch.isfinite(diffusion.predict(noisy, t, of_texts(diffusion))).all()
    mounted.detach()


@every_family
def test_presets_of_every_part(tiny_of, family):
    for name in WHOLE[family]:
        part = skeleton(tiny_of(family), name)
        smaller, middle, larger = (targets.match(part, p, name) for p in targets.PRESETS)
        assert set(smaller) < set(middle) <= set(larger)
    if "sd3" in family:
        part = skeleton(tiny_of(family), "transformer")
        every = [
            name
            for name, module in part.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        ]
        assert targets.match(part, "full", "transformer") == every
        only = targets.match(part, "attn-only", "transformer")
        assert all(".attn." in name for name in only) and len(only) == 2 * 8 - 1


@every_family
def test_images_depend_on_their_own_seed_and_may_have_another_size(tiny_of, family):
    diffusion = load(tiny_of(family))
    both = diffusion.sample(TEXTS, [5, 6], steps=2, guidance=3.0)
    alone = diffusion.sample(TEXTS[1:], [6], steps=2, guidance=3.0)
    assert both.shape == (2, 64, 64, 3) and both.dtype == np.uint8
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
    assert np.abs(both[1].astype(int) - both[0]).max() > 1
    if "sd3" not in family:  # its positions end at the size it was made for
        wide = diffusion.sample(TEXTS[:1], [5], steps=2, guidance=3.0, size=(48, 80))
        assert wide.shape == (1, 48, 80, 3)


@every_family
def test_images_are_those_of_the_family_s_own_pipeline(tiny_of, family):
    diffusion = load(tiny_of(family))
    found = diffusion.sample(TEXTS, [5, 6], steps=3, guidance=3.0)
    images = diffusion.pipeline()(
        TEXTS,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="np",
    ).images
    assert np.array_equal(found, (images * 255).round().astype(np.uint8))


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_images_are_sampled_in_half_precision_too(tiny_of, family):
    image = load(tiny_of(family), torch.bfloat16).sample(["a"], [0], steps=2, guidance=3.0)
    whole = load(tiny_of(family)).sample(["a"], [0], steps=2, guidance=3.0)
    assert np.abs(image.astype(float) - whole).mean() < 16


@every_family
def test_latents_are_scaled_and_shifted_and_come_back(tiny_of, family):
    diffusion = load(tiny_of(family))
    config = diffusion.vae.config
    rng = np.random.default_rng(0)
    for height, width in ((64, 64), (48, 80), (8, 104)):
        images = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        latents = diffusion.encode_images(images)
        assert latents.mean_NCHW.shape == (2, 4, height // 4, width // 4)
        x = torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            posterior = diffusion.vae.encode(x).latent_dist
            decoded = diffusion.vae.decode(posterior.mean).sample
        scaled = config.scaling_factor * (posterior.mean - (config.shift_factor or 0))
        torch.testing.assert_close(latents.mean_NCHW, scaled)
        torch.testing.assert_close(latents.std_NCHW, config.scaling_factor * posterior.std)
        back = diffusion.decode_images(latents.mean_NCHW).astype(float)
        expected = (decoded.clamp(-1, 1) + 1).permute(0, 2, 3, 1).numpy() * 127.5
        assert np.abs(back - expected).max() < 0.51


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_clip_skip_uses_an_earlier_layer_and_has_no_later_ones(tiny_of, family):
    whole = load(tiny_of(family))
    ids = whole.tokenize(TEXTS)
    layers = whole.text_encoder(ids["ids"], output_hidden_states=True).hidden_states
    for skip in (1, 2, 3):
        model = Model(path=str(tiny_of(family)), clip_skip=skip)
        found = load(model)
        expected = whole.text_encoder.final_layer_norm(layers[-skip])
        torch.testing.assert_close(found.read(ids)["hidden"], expected)
        names = targets.match(skeleton(model, "text_encoder"), "attn-mlp", "text_encoder")
        assert names == targets.match(found.text_encoder, "attn-mlp", "text_encoder")
        assert len(names) == 6 * (4 - skip)
        assert found.sample(["a"], [0], 2, 2.0).shape == (1, 64, 64, 3)
    assert fingerprint(model) != fingerprint(tiny_of(family))
    with pytest.raises(UserError, match="clip_skip is 4, but .* has 3 layers"):
        load(Model(path=str(tiny_of(family)), clip_skip=4))


def test_clip_skip_is_refused_where_the_family_has_chosen(tiny_of):
    for family in ("sdxl", "sd3"):
        with pytest.raises(UserError, match="model.clip_skip is 2, but .* needs 1"):
            load(Model(path=str(tiny_of(family)), clip_skip=2))


def test_what_is_predicted_can_be_said_against_the_files(tiny_of):
    model = Model(path=str(tiny_of("sd1")), prediction="v_prediction")
    diffusion = load(model)
    assert diffusion.objective.name == "v_prediction"
    assert diffusion.pipeline().scheduler.config.prediction_type == "v_prediction"
    assert fingerprint(model) != fingerprint(tiny_of("sd1"))
    with pytest.raises(UserError, match="model.prediction is 'epsilon', but .* flow matching"):
        load(Model(path=str(tiny_of("sd3")), prediction="epsilon"))


def changed(folder, tmp_path, part, **config):
    copy = shutil.copytree(folder, tmp_path / "changed")
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return copy


def test_models_for_something_else_are_refused(tiny_of, tmp_path):
    from diffusers import UNet2DConditionModel

    copy = changed(tiny_of("sd1"), tmp_path, "unet", in_channels=9)
    UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(copy / "unet")
    ).save_pretrained(copy / "unet")
    with pytest.raises(UserError, match="takes 9 channels where its VAE gives 4: it is no text-to"):
        load(copy)
    shutil.rmtree(copy)
    copy = changed(tiny_of("sdxl"), tmp_path, "vae", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(UserError, match="normalised by channel: not supported"):
        load(copy)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer_2", "vae", "scheduler"])
def test_a_folder_that_is_not_whole_says_what_it_lacks(tiny_of, tmp_path, part):
    copy = shutil.copytree(tiny_of("sdxl"), tmp_path / "copy")
    shutil.rmtree(copy / part)
    for opening in (load, sound):
        with pytest.raises(UserError, match=f"is not a whole model: it has no {part}$"):
            opening(copy)


def test_a_tokenizer_without_its_files_is_seen(tiny_of, tmp_path):
    copy = shutil.copytree(tiny_of("sd1"), tmp_path / "copy")
    for file in (copy / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(UserError, match="knows . tokens, its text encoder 514"):
        load(copy)


def test_files_say_which_model_they_are_of(tiny_of):
    described = {family: load(tiny_of(family)).described for family in FAMILIES}
    assert described["sd1"]["ss_base_model_version"] == "sd_v1"
    assert described["sd2"]["ss_v2"] == "True"
    assert described["sd2"]["ss_v_parameterization"] == "True"
    assert described["sdxl"]["ss_base_model_version"].startswith("sdxl")
    assert len({d["modelspec.architecture"] for d in described.values()}) == len(FAMILIES)
