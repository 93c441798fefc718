"""From trained parts to the folder that ships: a StableDiffusionPipeline, and its judges."""

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lyco_lab.miniature.pretrain import denoiser


def text_encoder(clip: CLIPModel) -> CLIPTextModel:
    """The pair's text tower as a model of its own."""
    config = copy.deepcopy(clip.config.text_config)
    assert isinstance(config, CLIPTextConfig)
    encoder = CLIPTextModel(config)
    tower = clip.text_model.state_dict()
    ours = encoder.state_dict()
    # transformers 5 keeps the tower's modules at the top, older ones below `text_model.`
    prefix = "" if tower.keys() & ours.keys() else "text_model."
    encoder.load_state_dict({prefix + k: v for k, v in tower.items()}, strict=True)
    encoder.set_attn_implementation("eager")
    return encoder.eval().requires_grad_(False)


def pipeline(
    vae: AutoencoderKL,
    words: CLIPTokenizer,
    encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        tokenizer=words,
        text_encoder=encoder,
        unet=unet,
        scheduler=denoiser.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(
    folder: Path,
    pipe: StableDiffusionPipeline,
    clip: CLIPModel,
    judges: dict[str, nn.Module],
) -> None:
    """Write everything to `folder` in half precision, by way of a folder beside it.

    What reads it gets float32: the text encoder's and CLIP's configurations say so, since
    transformers would otherwise keep the stored type, which a CPU cannot mix with the UNet's.
    """
    building = folder.with_name(folder.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    half = StableDiffusionPipeline(**_halved(pipe), requires_safety_checker=False)
    half.save_pretrained(building)
    copy.deepcopy(clip).half().save_pretrained(building / "judges" / "clip")
    for config in (building / "text_encoder" / "config.json", building / "judges/clip/config.json"):
        config.write_text(config.read_text().replace('"float16"', '"float32"'))
    for name, network in judges.items():
        state = {
            k: (v.half() if v.is_floating_point() else v).contiguous()
            for k, v in network.state_dict().items()
        }
        save_file(state, building / "judges" / f"{name}.safetensors")
    for part in building.iterdir():  # keep what is not ours in the folder: a model card
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        folder.mkdir(parents=True, exist_ok=True)
        part.replace(target)
    building.rmdir()


def _halved(pipe: StableDiffusionPipeline) -> dict[str, object]:
    # nn.Module's own `to`: diffusers' warns of layers to keep in float32, though there are none
    return {
        name: nn.Module.to(copy.deepcopy(part), torch.float16)
        if isinstance(part, nn.Module)
        else part
        for name, part in pipe.components.items()
    }
