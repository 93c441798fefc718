"""A model's networks without their weights: built from their configuration alone, in a second."""

import functools

from torch import nn

from lyco_lab.diffusion.base import quiet
from lyco_lab.diffusion.model import Named, network, opened, present
from lyco_lab.errors import UserError


@functools.cache
def skeleton(model: Named, part: str) -> nn.Module:
    """A part of the model, on the meta device: shapes without numbers."""
    with quiet():
        return network(*opened(model), part, None)


@functools.cache
def parts(model: Named, text_encoder: bool) -> tuple[str, ...]:
    """The parts of the model that a run adapts, in the order of `Diffusion.trained`."""
    source, family = opened(model)
    found = tuple(part for part in family.networks if present(source, family, part))
    return found if text_encoder else found[:1]


@functools.cache
def image_side(model: Named) -> int:
    """Side of the square images the model was trained on, in pixels, by its configuration."""
    source, family = opened(model)
    side: int | None = source.config(next(iter(family.networks))).get("sample_size")
    blocks = source.config("vae").get("block_out_channels")
    if not side or not blocks:
        raise UserError(f"{source.name} does not say of what size its images are")
    return side * 2 ** (len(blocks) - 1)
