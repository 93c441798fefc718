"""A dataset as the denoiser sees it, computed once: every latent, and every caption's text states.

A cached text is a row of each of a few tensors: hidden states (L, D), or token numbers (L,) where
the text encoders train too and have to be run in every step. The row after the last caption's is
the empty caption's, which caption dropout puts in place of others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lyco_lab.data.folder import Dataset, read_image
from lyco_lab.data.order import Order
from lyco_lab.diffusion.model import Diffusion, Latents, Sizes
from lyco_lab.errors import UserError


class Spread(NamedTuple):
    """Means and deviations of latents."""

    mean_BCHW: Tensor
    std_BCHW: Tensor


class Pictures(NamedTuple):
    """What a batch needs to know of its images."""

    latents: Spread
    sizes: Sizes
    weights: Tensor | None = None  # (B, 1, H, W) or (B, 1, 1, 1), in the loss; None: 1
    prior_B: Tensor | None = None


@dataclass(frozen=True)
class Cache:
    """All that training reads of a dataset, on the CPU."""

    latents: Latents  # of N images
    sizes: Sizes
    text: dict[str, Tensor]  # N + 1 rows each
    cut_captions: int  # how many are longer than the text encoder reads
    repeats: tuple[int, ...] = ()

    def order(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Order:
        return Order(self.repeats, batch_size, seed, rank, ranks)

    def pictures(self, indices_B: Tensor, flip_B: Tensor, at_B2: Tensor) -> Pictures:
        """As they are, neither mirrored nor cut elsewhere."""
        mean, std = self.latents.mean_NCHW[indices_B], self.latents.std_NCHW[indices_B]
        return Pictures(Spread(mean, std), self.sizes.rows(indices_B))

    def texts(
        self, indices_B: Tensor, dropped_B: Tensor, seeds: Callable[[int], int]
    ) -> dict[str, Tensor]:
        empty = len(next(iter(self.text.values()))) - 1
        captions_B = torch.where(dropped_B, empty, indices_B)
        return {name: rows[captions_B] for name, rows in self.text.items()}

    def dropout(self, indices_B: Tensor, rate: float) -> Tensor:
        return torch.full((len(indices_B),), rate)


def build(diffusion: Diffusion, dataset: Dataset, *, text_states: bool) -> Cache:
    """`text_states`: whether the text encoders are frozen, so that their output can be kept."""
    latents = diffusion.encode_images(dataset.images(diffusion.image_size))
    finite = torch.isfinite(latents.mean_NCHW + latents.std_NCHW).flatten(1).all(1)
    if not finite.all():
        file = dataset.items[int(finite.logical_not().nonzero()[0])].file
        raise UserError(f"the VAE gives a latent of {file} that is not finite: check the model")
    texts = [*dataset.captions, ""]
    text = diffusion.encode_text(texts) if text_states else diffusion.tokenize(texts)
    return Cache(
        latents=Latents(latents.mean_NCHW.cpu(), latents.std_NCHW.cpu()),
        sizes=_sizes(dataset, diffusion.image_size),
        text={name: rows.cpu() for name, rows in text.items()},
        cut_captions=sum(map(diffusion.too_long, dataset.captions)),
        repeats=dataset.repeats,
    )


def _sizes(dataset: Dataset, side: int) -> Sizes:
    """Of images of which the largest square in the middle was resized."""
    original_N2 = torch.tensor([read_image(item.file).size[::-1] for item in dataset.items])
    scale_N1 = side / original_N2.amin(1, keepdim=True)
    return Sizes(
        original_N2=original_N2,
        corner_N2=((original_N2 * scale_N1).round().long() - side) // 2,
        target_N2=torch.full_like(original_N2, side),
    )
