"""Stable Diffusion 1.x: CLIP's text encoder, and a UNet that predicts the noise."""

from dataclasses import dataclass
from typing import ClassVar

from lyco_lab.diffusion.clip_unet import ClipUNet
from lyco_lab.diffusion.sources.base import Source


@dataclass(frozen=True)
class SD1(ClipUNet):
    metadata: ClassVar = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }

    @classmethod
    def fits(cls, source: Source) -> bool:
        return cls.one_encoder(source) and not cls.open_clip(source)
