"""A Stable Diffusion model, frozen, as training and generation need it.

    x  --VAE-->  z = scaling * encoder(x)             images to latents
    z, e, t      z_t = sqrt(a_t) z + sqrt(1 - a_t) e  noise added at timestep t
    UNet         e ~ unet(z_t, t, text)               what an adapter is trained on

Images cross this boundary as uint8 arrays of shape (N, height, width, 3); inside they are floats
in [-1, 1]. The VAE stays in float32 whatever the rest is in: in half precision it overflows.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from lyco_lab.errors import UserError

MEGABYTE = 2**20
NEEDED = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")


def fingerprint(folder: Path) -> str:
    """Eight hex digits that change with the model's weights.

    Of each weight file: name, size, and the first and last megabyte. All of a full-size model
    would take a minute to read, and another training moves these bytes too.
    """
    digest = hashlib.blake2b(digest_size=4)
    for part in NEEDED:
        for file in sorted((folder / part).glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{part}/{file.name}:{size}".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(MEGABYTE))
                opened.seek(max(0, size - MEGABYTE))
                digest.update(opened.read())
    return digest.hexdigest()


@dataclass(frozen=True)
class Latents:
    """What the VAE says of some images: a mean and a deviation per latent, already scaled."""

    mean_NCHW: Tensor
    std_NCHW: Tensor

    def sample(self, rng: Generator) -> Tensor:
        noise = torch.randn(self.mean_NCHW.shape, generator=rng).to(self.mean_NCHW)
        return self.mean_NCHW + self.std_NCHW * noise


@dataclass(frozen=True)
class Diffusion:
    """The parts of a Stable Diffusion model: frozen, in evaluation mode."""

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    noise_scheduler: Any

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """The parts an adapter can be put on, by the names used in adapter files."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    @property
    def image_size(self) -> int:
        """Side of the square images the model was trained on, in pixels."""
        factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side: int = self.unet.config.sample_size
        return side * factor

    def to(self, device: torch.device | str) -> "Diffusion":
        for part in (self.text_encoder, self.unet, self.vae):
            part.to(device)
        return self

    @torch.no_grad()
    def encode_images(self, images_NHWC: NDArray[np.uint8], batch_size: int = 16) -> Latents:
        means, stds = [], []
        for start in range(0, len(images_NHWC), batch_size):
            x_NHWC = torch.from_numpy(np.ascontiguousarray(images_NHWC[start : start + batch_size]))
            x_NCHW = x_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
            posterior = self.vae.encode(x_NCHW.to(self.vae.device)).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
        scaling = self.vae.config.scaling_factor
        return Latents(scaling * torch.cat(means), scaling * torch.cat(stds))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token numbers (N, L), padded or cut to the text encoder's length."""
        ids: Tensor = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

    def too_long(self, text: str) -> bool:
        """Whether `tokenize` would cut the end off."""
        length: int = len(self.tokenizer(text, truncation=False, verbose=False).input_ids)
        return length > self.tokenizer.model_max_length

    def hidden(self, ids_NL: Tensor) -> Tensor:
        """The text encoder's last hidden states (N, L, D); differentiable."""
        hidden: Tensor = self.text_encoder(ids_NL.to(self.text_encoder.device))[0]
        return hidden

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.hidden(self.tokenize(texts))

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> NDArray[np.uint8]:
        """One image per prompt by DDIM, each from its own seed whatever the batch around it."""
        pipeline = self.pipeline()
        images = pipeline(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        return (images * 255).round().astype(np.uint8)

    def pipeline(self) -> Any:
        """A diffusers pipeline on these very modules: no second copy of the weights."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        with quiet():
            pipeline: Any = StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=self.unet,
                scheduler=DDIMScheduler.from_config(self.noise_scheduler.config),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> Diffusion:
    """The model in the diffusers folder `path`, which is never fetched from anywhere."""
    folder = Path(path)
    missing = [name for name in NEEDED if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"model.path is {str(path)!r}, which is not a folder saved by diffusers: "
            f"it has no {', '.join(missing)}"
        )
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel, CLIPTokenizer

    def part(cls: Any, name: str, **options: Any) -> Any:
        try:
            return cls.from_pretrained(folder, subfolder=name, local_files_only=True, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise UserError(
                f"cannot load {name} of model.path={str(path)!r}: {first_line}"
            ) from error

    with quiet():
        scheduler = part(DDPMScheduler, "scheduler")
        if scheduler.config.prediction_type != "epsilon":
            raise UserError(
                f"the model in {str(path)!r} predicts {scheduler.config.prediction_type!r}; "
                "training needs one that predicts 'epsilon', the noise"
            )
        diffusion = Diffusion(
            tokenizer=part(CLIPTokenizer, "tokenizer"),
            # A folder may hold float16, which is too coarse to train on: always asked for by name.
            text_encoder=part(CLIPTextModel, "text_encoder", dtype=dtype),
            unet=part(UNet2DConditionModel, "unet", torch_dtype=dtype),
            vae=part(AutoencoderKL, "vae", torch_dtype=torch.float32),
            noise_scheduler=scheduler,
        )
    for module in (diffusion.text_encoder, diffusion.unet, diffusion.vae):
        module.requires_grad_(False).eval()
    if not torch.cuda.is_available():
        # On a CPU the fused attention's backward pass is slower than the plain one.
        diffusion.unet.set_attn_processor(AttnProcessor())
    return diffusion


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and advice; their errors are raised all the same."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loud = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        diffusers_logging.set_verbosity(loud[0])
        transformers_logging.set_verbosity(loud[1])
        if bars:
            transformers_logging.enable_progress_bar()
