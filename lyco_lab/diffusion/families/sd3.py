"""Stable Diffusion 3: a transformer trained by flow matching, and up to three text encoders.

    hidden    the last but one hidden states of two CLIPs, side by side, filled up with zeros to
              T5's width; after them, as further tokens, T5's, or zeros where there is no T5
    pooled    of both CLIPs, side by side

Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis
(Esser et al., 2024), https://arxiv.org/abs/2403.03206
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lyco_lab.diffusion.base import Diffusion, Rows, Sizes, Words, quiet
from lyco_lab.diffusion.sources.base import Source

T5_LENGTH = 256  # tokens of a text


@dataclass(frozen=True)
class SD3(Diffusion):
    networks: ClassVar = {
        "transformer": "diffusers.SD3Transformer2DModel",
        "text_encoder": "transformers.CLIPTextModelWithProjection",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        "text_encoder_3": "transformers.T5EncoderModel",
    }
    words: ClassVar = {
        "tokenizer": Words(),
        "tokenizer_2": Words(pad="!"),
        "tokenizer_3": Words("transformers.AutoTokenizer"),
    }
    optional: ClassVar = ("text_encoder_3", "tokenizer_3")
    metadata: ClassVar = {
        "ss_base_model_version": "sd3",
        "modelspec.architecture": "stable-diffusion-3/lora",
    }

    tokenizer: Any
    tokenizer_2: Any
    text_encoder: Any
    text_encoder_2: Any
    transformer: Any
    tokenizer_3: Any = None
    text_encoder_3: Any = None

    def __post_init__(self) -> None:
        if self.tokenizer_3 is not None:
            self.tokenizer_3.model_max_length = T5_LENGTH

    @classmethod
    def fits(cls, source: Source) -> bool:
        if not source.has("transformer"):
            return False
        return source.config("transformer").get("_class_name") == "SD3Transformer2DModel"

    def read(self, ids: Rows) -> dict[str, Tensor]:
        hidden, pooled = [], []
        for name, encoder in (("ids", self.text_encoder), ("ids_2", self.text_encoder_2)):
            said = encoder(ids[name].to(encoder.device), output_hidden_states=True)
            hidden.append(said.hidden_states[-2])
            pooled.append(said[0])
        clip = torch.cat(hidden, -1)
        width = self.transformer.config.joint_attention_dim
        if self.text_encoder_3 is None:
            t5 = clip.new_zeros(len(clip), T5_LENGTH, width)
        else:
            t5 = self.text_encoder_3(ids["ids_3"].to(self.text_encoder_3.device))[0]
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        return {"hidden": torch.cat([clip, t5], 1), "pooled": torch.cat(pooled, -1)}

    def told(self, text: Rows, sizes: Sizes) -> dict[str, Tensor]:
        return {"hidden": text["hidden"], "pooled": text["pooled"]}

    def denoise(self, noisy: Tensor, time: Tensor, conditioning: Rows) -> Tensor:
        predicted: Tensor = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=conditioning["hidden"].to(self.dtype),
            pooled_projections=conditioning["pooled"].to(self.dtype),
            timestep=time,
            return_dict=False,
        )[0]
        return predicted

    def pipeline(self) -> Any:
        from diffusers import StableDiffusion3Pipeline

        from lyco_lab.diffusion.sampler import FlowSampler

        with quiet():
            pipeline: Any = StableDiffusion3Pipeline(
                transformer=self.transformer,
                scheduler=FlowSampler.from_config(dict(self.schedule)),
                vae=self.vae,
                text_encoder=self.text_encoder,
                text_encoder_2=self.text_encoder_2,
                text_encoder_3=self.text_encoder_3,
                tokenizer=self.tokenizer,
                tokenizer_2=self.tokenizer_2,
                tokenizer_3=self.tokenizer_3,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
