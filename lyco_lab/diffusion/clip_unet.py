"""A UNet that is told the last hidden states of one CLIP text encoder: Stable Diffusion 1 and 2."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lyco_lab.diffusion import long_text
from lyco_lab.diffusion.base import Diffusion, Rows, Sizes, Words, quiet
from lyco_lab.diffusion.sources.base import Source


@dataclass(frozen=True)
class ClipUNet(Diffusion):
    networks: ClassVar = {
        "unet": "diffusers.UNet2DConditionModel",
        "text_encoder": "transformers.CLIPTextModel",
    }
    words: ClassVar = {"tokenizer": Words()}
    skips_layers: ClassVar = True
    joins_chunks: ClassVar = True

    tokenizer: Any
    text_encoder: Any
    unet: Any

    @staticmethod
    def one_encoder(source: Source) -> bool:
        return source.has("unet") and not source.has("text_encoder_2")

    @staticmethod
    def open_clip(source: Source) -> bool:
        """Whether the text encoder is of SD 2's kind."""
        return source.config("text_encoder").get("hidden_act") == "gelu"

    def read(self, ids: Rows) -> dict[str, Tensor]:
        each = long_text.apart(ids["ids"], self.chunks)
        said = self.text_encoder(each.to(self.text_encoder.device))[0]
        return {"hidden": long_text.joined(said, self.chunks)}

    def told(self, text: Rows, sizes: Sizes) -> dict[str, Tensor]:
        return {"hidden": text["hidden"]}

    def denoise(self, noisy: Tensor, time: Tensor, conditioning: Rows) -> Tensor:
        hidden = conditioning["hidden"].to(self.dtype)
        predicted: Tensor = self.unet(noisy, time, hidden, return_dict=False)[0]
        return predicted

    def pipeline(self) -> Any:
        from diffusers import StableDiffusionPipeline

        with quiet():
            pipeline: Any = StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=self.unet,
                scheduler=self.ddim(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
