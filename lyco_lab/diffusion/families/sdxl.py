"""Stable Diffusion XL: two text encoders, and a UNet that is also told what was done to the image.

    hidden    the last but one hidden states of both text encoders, side by side
    pooled    the second's, of the text as a whole
    time ids  original height and width, top and left of the crop, target height and width

Where the model's files say so (`force_zeros_for_empty_prompt`), as SDXL's do, the empty text is all
zeros: what sampling without a negative prompt starts from, and hence what a dropped caption is.

Reference: SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis
(Podell et al., 2023), https://arxiv.org/abs/2307.01952
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lyco_lab.diffusion import long_text
from lyco_lab.diffusion.base import Diffusion, Rows, Sizes, Words, quiet
from lyco_lab.diffusion.sources.base import Source


@dataclass(frozen=True)
class SDXL(Diffusion):
    networks: ClassVar = {
        "unet": "diffusers.UNet2DConditionModel",
        "text_encoder": "transformers.CLIPTextModel",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
    }
    words: ClassVar = {"tokenizer": Words(), "tokenizer_2": Words(pad="!")}
    joins_chunks: ClassVar = True
    metadata: ClassVar = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    }

    tokenizer: Any
    tokenizer_2: Any
    text_encoder: Any
    text_encoder_2: Any
    unet: Any
    empty_is_zero: bool = True

    @classmethod
    def fits(cls, source: Source) -> bool:
        return source.has("unet") and source.has("text_encoder_2")

    @classmethod
    def more(cls, source: Source) -> dict[str, Any]:
        return {"empty_is_zero": source.index().get("force_zeros_for_empty_prompt", True)}

    def read(self, ids: Rows) -> dict[str, Tensor]:
        first, second = (
            encoder(
                long_text.apart(ids[name], self.chunks).to(encoder.device),
                output_hidden_states=True,
            )
            for name, encoder in (("ids", self.text_encoder), ("ids_2", self.text_encoder_2))
        )
        hidden_NLD = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        hidden_NLD = long_text.joined(hidden_NLD, self.chunks)
        pooled_ND = second.text_embeds[:: self.chunks]  # of each text's first chunk
        if self.empty_is_zero:
            # The token after the start is the end, where there is nothing between them.
            empty_N = (ids["ids"][:, 1] == self.tokenizer.eos_token_id).to(pooled_ND.device)
            hidden_NLD = hidden_NLD.masked_fill(empty_N[:, None, None], 0)
            pooled_ND = pooled_ND.masked_fill(empty_N[:, None], 0)
        return {"hidden": hidden_NLD, "pooled": pooled_ND}

    def told(self, text: Rows, sizes: Sizes) -> dict[str, Tensor]:
        time_ids = torch.cat(sizes, 1).to(text["hidden"].device, torch.float32)
        return {"hidden": text["hidden"], "pooled": text["pooled"], "time_ids": time_ids}

    def denoise(self, noisy: Tensor, time: Tensor, conditioning: Rows) -> Tensor:
        added = {
            "text_embeds": conditioning["pooled"].to(self.dtype),
            "time_ids": conditioning["time_ids"],
        }
        hidden = conditioning["hidden"].to(self.dtype)
        predicted: Tensor = self.unet(
            noisy, time, hidden, added_cond_kwargs=added, return_dict=False
        )[0]
        return predicted

    def pipeline(self) -> Any:
        from diffusers import StableDiffusionXLPipeline

        with quiet():
            pipeline: Any = StableDiffusionXLPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                text_encoder_2=self.text_encoder_2,
                tokenizer=self.tokenizer,
                tokenizer_2=self.tokenizer_2,
                unet=self.unet,
                scheduler=self.ddim(),
                force_zeros_for_empty_prompt=self.empty_is_zero,
                add_watermarker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
