"""Stable Diffusion 1.x: a UNet that is told the last hidden states of one CLIP text encoder."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lyco_lab.diffusion.base import Diffusion, Rows, Sizes, quiet


@dataclass(frozen=True)
class SD1(Diffusion):
    PARTS: ClassVar = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")

    tokenizer: Any
    text_encoder: Any
    unet: Any

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {"ids": self.tokenizer}

    def read(self, ids: Rows) -> dict[str, Tensor]:
        return {"hidden": self.text_encoder(ids["ids"].to(self.text_encoder.device))[0]}

    def told(self, text: Rows, sizes: Sizes) -> dict[str, Tensor]:
        return {"hidden": text["hidden"]}

    def denoise(self, noisy: Tensor, time: Tensor, conditioning: Rows) -> Tensor:
        hidden = conditioning["hidden"].to(self.dtype)
        predicted: Tensor = self.unet(noisy, time, hidden, return_dict=False)[0]
        return predicted

    def pipeline(self) -> Any:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        with quiet():
            pipeline: Any = StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=self.unet,
                scheduler=DDIMScheduler.from_config(dict(self.schedule)),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
