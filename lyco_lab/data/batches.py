"""What a training step sees, as a pure function of (seed, step, rank).

Which images is order.py's to say. Noise, timesteps, dropped captions, mirrored images and shuffled
tags come from generators of their own, drawn for all processes together and dealt to them in turn:
two processes see the two halves of what one would see with twice the batch. Nothing is carried from
one step to the next: a run that resumes at a step draws what it would have drawn.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from lyco_lab.data.cache import Pictures
from lyco_lab.data.order import Order
from lyco_lab.diffusion.model import Sizes
from lyco_lab.seeds import derive, generator

__all__ = ["Batch", "Batches", "Material", "Order", "draw"]


class Material(Protocol):
    """What batches are made of: cache.py's in memory, stored.py's on disk."""

    def pictures(self, indices_B: Tensor, flip_B: Tensor, at_B2: Tensor) -> Pictures: ...

    def texts(
        self, indices_B: Tensor, dropped_B: Tensor, seeds: Callable[[int], int]
    ) -> dict[str, Tensor]: ...

    def dropout(self, indices_B: Tensor, rate: float) -> Tensor: ...


class Batch(NamedTuple):
    """One step's input."""

    step: int
    indices_B: Tensor  # which images
    latents_BCHW: Tensor
    noise_BCHW: Tensor
    timesteps_B: Tensor
    sizes: Sizes
    text: dict[str, Tensor]  # B rows of each of the material's
    # Factors of the squared errors, (B, 1, H, W) or (B, 1, 1, 1): masks, and prior images' weight.
    weights: Tensor | None = None  # None: 1
    prior_B: Tensor | None = None  # which only keep the model from forgetting; None: none
    perturbation_BCHW: Tensor | None = None  # of the noise as the denoiser sees it; None: 0
    part: int = 0  # which of the parts of the step's samples this is
    last: bool = True  # that this process sees of the step


def draw(
    material: Material, order: Order, step: int, *, timesteps: int, caption_dropout: float
) -> Batch:
    """The batch of `step`. `timesteps`: how many there are to draw from."""
    indices_B = order.indices(step)
    first = order.rank * order.batch_size
    ours = slice(first, first + order.batch_size)

    def dealt(what: str, make: Callable[[Generator], Tensor]) -> Tensor:
        return make(generator(order.seed, what, step, 0))[ours]

    def uniform(what: str, *shape: int) -> Tensor:
        return dealt(what, lambda rng: torch.rand((order.together, *shape), generator=rng))

    found = material.pictures(indices_B, uniform("flip") < 0.5, uniform("crop", 2))
    mean_BCHW, std_BCHW = found.latents
    shape = (order.together, *mean_BCHW.shape[1:])

    def normal(what: str) -> Tensor:
        return dealt(what, lambda rng: torch.randn(shape, generator=rng))

    def seed(place: int) -> int:
        return derive(order.seed, "caption", step, first + place)

    dropped_B = uniform("dropout") < material.dropout(indices_B, caption_dropout)
    return Batch(
        step=step,
        indices_B=indices_B,
        latents_BCHW=mean_BCHW + std_BCHW * normal("latent"),
        noise_BCHW=normal("noise"),
        timesteps_B=dealt(
            "timestep", lambda rng: torch.randint(timesteps, (order.together,), generator=rng)
        ),
        sizes=found.sizes,
        text=material.texts(indices_B, dropped_B, seed),
        weights=found.weights,
        prior_B=found.prior_B,
    )


@dataclass(frozen=True)
class Batches:
    """The batches of steps `start` to `stop`, `stop` not included; iterable again and again."""

    material: Material
    order: Order
    start: int
    stop: int
    timesteps: int
    caption_dropout: float

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start, self.stop):
            yield draw(
                self.material,
                self.order,
                step,
                timesteps=self.timesteps,
                caption_dropout=self.caption_dropout,
            )
