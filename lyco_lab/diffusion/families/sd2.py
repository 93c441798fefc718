"""Stable Diffusion 2.x: OpenCLIP's text encoder without its last layer, and most often velocity."""

from dataclasses import dataclass
from typing import ClassVar

from lyco_lab.diffusion.base import Words
from lyco_lab.diffusion.clip_unet import ClipUNet
from lyco_lab.diffusion.sources.base import Source


@dataclass(frozen=True)
class SD2(ClipUNet):
    words: ClassVar = {"tokenizer": Words(pad="!")}
    metadata: ClassVar = {
        "ss_base_model_version": "sd_v2",
        "ss_v2": "True",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
    }

    @classmethod
    def fits(cls, source: Source) -> bool:
        return cls.one_encoder(source) and cls.open_clip(source)
