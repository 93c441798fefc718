"""A dataset as the UNet sees it, computed once: every latent, and every caption's text states.

A cached text is a row: hidden states (L, D), or token numbers (L,) where the text encoder trains
too and has to be run in every step. The row after the last caption's is the empty caption's,
which caption dropout puts in place of others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lyco_lab.data.folder import Dataset
from lyco_lab.diffusion.model import Diffusion, Latents
from lyco_lab.errors import UserError


@dataclass(frozen=True)
class Cache:
    """All that training reads of a dataset, on the CPU."""

    latents: Latents  # of N images
    text: Tensor  # N + 1 rows
    cut_captions: int  # how many are longer than the text encoder reads


def build(diffusion: Diffusion, dataset: Dataset, *, text_states: bool) -> Cache:
    """`text_states`: whether the text encoder is frozen, so that its output can be kept."""
    latents = diffusion.encode_images(dataset.images(diffusion.image_size))
    finite = torch.isfinite(latents.mean_NCHW + latents.std_NCHW).flatten(1).all(1)
    if not finite.all():
        file = dataset.items[int(finite.logical_not().nonzero()[0])].file
        raise UserError(f"the VAE gives a latent of {file} that is not finite: check the model")
    texts = [*dataset.captions, ""]
    text = diffusion.encode_text(texts) if text_states else diffusion.tokenize(texts)
    return Cache(
        latents=Latents(latents.mean_NCHW.cpu(), latents.std_NCHW.cpu()),
        text=text.cpu(),
        cut_captions=sum(map(diffusion.too_long, dataset.captions)),
    )
