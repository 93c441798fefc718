"""A model's networks without their weights: built from their configuration alone, in a second."""

import functools
from pathlib import Path

import torch
from torch import nn

from lyco_lab.errors import UserError


@functools.cache
def skeleton(model: Path, part: str) -> nn.Module:
    """A part of the model in `model`, on the meta device: shapes without numbers."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if not (model / part / "config.json").is_file():
        raise UserError(f"model.path is {str(model)!r}: it has no {part}/config.json")
    with torch.device("meta"):
        if part == "unet":
            return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model / part))
        return CLIPTextModel(CLIPTextConfig.from_pretrained(model / part))
