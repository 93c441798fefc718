"""A Stable Diffusion model, frozen, as training and generation need it.

    x  --VAE-->  z = scaling * (encoder(x) - shift)   images to latents
    z, e, t      z_t                                  noise added at timestep t (objective.py)
    denoiser     target ~ denoiser(z_t, t, c)         what an adapter is trained on

Images cross this boundary as uint8 arrays of shape (N, height, width, 3); inside they are floats
in [-1, 1]. The VAE stays in float32 whatever the rest is in: in half precision it overflows.

A text crosses it as rows of tensors, one per caption: what the text encoders say of it ("hidden",
"pooled"), or the numbers of its tokens ("ids", "ids_2", …) where text encoders train too and have
to be run in every step. `condition` makes of either what the denoiser is told, c.
"""

import abc
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from lyco_lab import waits
from lyco_lab.diffusion import long_text
from lyco_lab.diffusion.memory import AtOnce
from lyco_lab.diffusion.objective import Objective
from lyco_lab.diffusion.sources.base import Source
from lyco_lab.errors import UserError

Rows = Mapping[str, Tensor]  # by name, tensors with a row for each sample
PROMPTS = {"hidden": "prompt_embeds", "pooled": "pooled_prompt_embeds"}  # as pipelines call them


class NoPicture(UserError):
    """What was drawn has numbers that are not finite: it would be shown as a black image."""


@dataclass(frozen=True)
class Latents:
    """What the VAE says of some images: a mean and a deviation per latent, already scaled."""

    mean_NCHW: Tensor
    std_NCHW: Tensor

    def sample(self, rng: Generator) -> Tensor:
        noise = torch.randn(self.mean_NCHW.shape, generator=rng).to(self.mean_NCHW)
        return self.mean_NCHW + self.std_NCHW * noise


class Sizes(NamedTuple):
    """Of N images, in pixels, height before width."""

    original_N2: Tensor  # before they were resized
    corner_N2: Tensor  # where they were cropped after that: top, left
    target_N2: Tensor  # what is left

    def rows(self, indices: Tensor) -> "Sizes":
        return Sizes(*(tensor[indices] for tensor in self))

    @classmethod
    def whole(cls, height: int, width: int, count: int = 1) -> "Sizes":
        """Of images that were neither resized nor cropped."""
        size = torch.tensor([height, width]).expand(count, 2)
        return cls(size, torch.zeros_like(size), size)


class Words(NamedTuple):
    """A kind of tokenizer, and the token that fills up short texts where no file says so."""

    cls: str = "transformers.CLIPTokenizer"
    pad: str | None = None


@dataclass(frozen=True)
class Diffusion(abc.ABC):
    """The parts of a Stable Diffusion model: frozen, in evaluation mode.

    A family is a subclass in families/. Its further fields are called as its parts are in a
    diffusers folder.
    """

    networks: ClassVar[Mapping[str, str]]  # the denoiser first, then text encoders -> their classes
    words: ClassVar[Mapping[str, Words]]  # tokenizers -> their kinds
    optional: ClassVar[tuple[str, ...]] = ()  # the parts that a model may lack
    skips_layers: ClassVar[bool] = False  # whether a model may be used with its clip skipped
    joins_chunks: ClassVar[bool] = False  # whether texts may be longer than a window
    metadata: ClassVar[Mapping[str, str]]  # what an adapter's file says of the family

    vae: Any
    schedule: Mapping[str, Any]  # of noise, as a diffusers scheduler is configured
    objective: Objective
    dtype: torch.dtype  # of all parts but the VAE
    chunks: int = field(default=1, kw_only=True)  # of a text, each read by itself

    @classmethod
    @abc.abstractmethod
    def fits(cls, source: Source) -> bool:
        """Whether the model is one of this family."""

    @classmethod
    def more(cls, source: Source) -> dict[str, Any]:
        """Fields that are neither a network nor a tokenizer."""
        return {}

    @abc.abstractmethod
    def read(self, ids: Rows) -> dict[str, Tensor]:
        """What the text encoders say of tokens; differentiable."""

    @abc.abstractmethod
    def told(self, text: Rows, sizes: Sizes) -> dict[str, Tensor]:
        """What the denoiser is told of texts that were read, and of the images' sizes."""

    @abc.abstractmethod
    def denoise(self, noisy: Tensor, time: Tensor, conditioning: Rows) -> Tensor:
        """The denoiser's output, in its precision."""

    @abc.abstractmethod
    def pipeline(self) -> Any:
        """A diffusers pipeline on these very modules: no second copy of the weights."""

    @property
    def parts(self) -> dict[str, Any]:
        """The parts an adapter can be put on, the denoiser first, by the names in adapter files."""
        parts = {name: getattr(self, name) for name in self.networks}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """By what their numbers are called: "ids", "ids_2", …"""
        found = {name.replace("tokenizer", "ids"): getattr(self, name) for name in self.words}
        return {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}

    @property
    def denoiser(self) -> Any:
        """The part that is always adapted."""
        return next(iter(self.parts.values()))

    def trained(self, text_encoder: bool) -> dict[str, Any]:
        """The parts that a run adapts: the denoiser, and the text encoders if asked for."""
        parts = self.parts
        return parts if text_encoder else dict(list(parts.items())[:1])

    @property
    def described(self) -> dict[str, str]:
        """What an adapter's file says of the model it was trained on."""
        velocity = self.objective.name == "v_prediction"
        predicts = {"modelspec.prediction_type": "v" if velocity else self.objective.name}
        described = {**self.metadata, **predicts, "ss_v_parameterization": str(velocity)}
        if self.chunks > 1:
            (tokenizer, *_) = self.tokenizers.values()
            described["ss_max_token_length"] = str(long_text.longest(tokenizer, self.chunks) - 2)
        return described

    @property
    def image_size(self) -> int:
        """Side of the square images the model was trained on, in pixels."""
        factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side: int = self.denoiser.config.sample_size
        return side * factor

    def to(self, device: torch.device | str) -> "Diffusion":
        for part in (*self.parts.values(), self.vae):
            part.to(device)
        return self

    @torch.no_grad()
    def encode_images(self, images_NHWC: NDArray[np.uint8], batch_size: int = 16) -> Latents:
        """Images of one size, a multiple of 8 in both directions."""
        means, stds = [], []
        for start in range(0, len(images_NHWC), batch_size):
            x_NHWC = torch.from_numpy(np.ascontiguousarray(images_NHWC[start : start + batch_size]))
            x_NCHW = x_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
            posterior = self.vae.encode(x_NCHW.to(self.vae.device)).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
        scaling, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor
        mean_NCHW = torch.cat(means)
        if shift is not None:
            mean_NCHW = mean_NCHW - shift
        return Latents(scaling * mean_NCHW, scaling * torch.cat(stds))

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token numbers (N, K L) of K chunks, padded or cut to the text encoders' lengths."""
        return {
            name: long_text.tokens(tokenizer, texts, self.chunks)
            for name, tokenizer in self.tokenizers.items()
        }

    def too_long(self, text: str) -> bool:
        """Whether `tokenize` would cut the end off."""
        return any(
            len(tokenizer(text, truncation=False, verbose=False).input_ids)
            > long_text.longest(tokenizer, self.chunks)
            for tokenizer in self.tokenizers.values()
        )

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders say of texts, a row for each."""
        return self.read(self.tokenize(texts))

    def condition(self, text: Rows, sizes: Sizes) -> dict[str, Tensor]:
        """What the denoiser is told. Rows of token numbers are read by the text encoders first."""
        return self.told(self.read(text) if "ids" in text else text, sizes)

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Rows) -> Tensor:
        """The denoiser's estimate of the objective's target, in float32."""
        return self.denoise(noisy.to(self.dtype), self.objective.time(t), conditioning).float()

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        size: tuple[int, int] | None = None,
        at_once: AtOnce | None = None,
    ) -> NDArray[np.uint8]:
        """One image per prompt, each from its own seed whatever the batch around it.

        `size`: height and width in pixels; None: as the model was trained. Where memory runs out,
        fewer are drawn `at_once`, which is then lower. The batch around an image still moves its
        last bits. Raises `NoPicture` where latents or images are not finite.
        """
        height, width = size or (self.image_size, self.image_size)
        at_once, one = at_once or AtOnce(), f"{width} x {height} pixels"

        def draw(part: slice) -> Tensor:
            return self._latents(prompts[part], seeds[part], steps, guidance, height, width)

        latents_NCHW = torch.cat(at_once.draw(len(prompts), draw, one))
        names = [f"the prompt {p!r} with seed {s}" for p, s in zip(prompts, seeds, strict=True)]
        need_finite(latents_NCHW, "latent", names)

        def decode(part: slice) -> NDArray[np.uint8]:
            return self.decode_images(latents_NCHW[part], names[part])

        return np.concatenate(at_once.decode(len(prompts), decode, one))

    def _latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        height: int,
        width: int,
    ) -> Tensor:
        told: dict[str, Tensor] = {}
        for kind, texts in (("", prompts), ("negative_", [""] * len(prompts))):
            said = self.encode_text(texts)
            told |= {f"{kind}{PROMPTS[name]}": rows for name, rows in said.items()}
        latents_NCHW: Tensor = self.pipeline()(
            **told,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            height=height,
            width=width,
            output_type="latent",
        ).images
        return latents_NCHW

    @torch.no_grad()
    def decode_images(
        self, latents_NCHW: Tensor, names: Sequence[str] | None = None
    ) -> NDArray[np.uint8]:
        """What `encode_images` made latents of; in float32, as it is done there.

        Raises `NoPicture`, with the image's name, where an image is not finite.
        """
        scaling, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor
        latents_NCHW = latents_NCHW.float() / scaling
        if shift is not None:
            latents_NCHW = latents_NCHW + shift
        x_NCHW = self.vae.decode(latents_NCHW, return_dict=False)[0]
        need_finite(x_NCHW, "image", names)
        x_NHWC = (x_NCHW * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (waits.host(x_NHWC, "images").numpy() * 255).round().astype(np.uint8)

    def ddim(self) -> Any:
        """A sampler that follows the model's own schedule."""
        from lyco_lab.diffusion.sampler import Sampler

        # Latents have no range to be clipped to, and a configuration may leave that to a default.
        return Sampler.from_config(
            dict(self.schedule), prediction_type=self.objective.name, clip_sample=False
        )


def need_finite(x_NCHW: Tensor, what: str, names: Sequence[str] | None = None) -> None:
    """Raise `NoPicture` for the first sample with a number that is not finite."""
    finite_N = waits.host(torch.isfinite(x_NCHW).flatten(1).all(1), "images").tolist()
    if all(finite_N):
        return
    first = finite_N.index(False)
    name = f"sample {first}" if names is None else names[first]
    raise NoPicture(f"the {what} of {name} is not finite: it would be shown as black")


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
