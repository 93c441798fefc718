"""A dataset as the denoiser sees it, computed once: every latent, and every caption's text states.

A cached text is a row of each of a few tensors: hidden states (L, D), or token numbers (L,) where
the text encoders train too and have to be run in every step. The row after the last caption's is
the empty caption's, which caption dropout puts in place of others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lyco_lab.data.folder import Dataset, read_image
from lyco_lab.diffusion.model import Diffusion, Latents, Sizes
from lyco_lab.errors import UserError


@dataclass(frozen=True)
class Cache:
    """All that training reads of a dataset, on the CPU."""

    latents: Latents  # of N images
    sizes: Sizes
    text: dict[str, Tensor]  # N + 1 rows each
    cut_captions: int  # how many are longer than the text encoder reads


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
