"""What a training step sees, as a pure function of (seed, step, rank).

The images of an epoch are shuffled, each as often as its repeats say, and the epochs laid end to
end; a batch is the next `batch_size` of them, so all batches are full however few images there
are. Noise, timesteps and dropped captions come from generators of their own. Nothing is carried
from one step to the next: a run that resumes at a step draws what it would have drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lyco_lab.data.cache import Cache
from lyco_lab.diffusion.model import Sizes
from lyco_lab.seeds import generator


@dataclass(frozen=True)
class Order:
    """Which images each step shows. `ranks` processes share a step's images, `rank` is ours."""

    repeats: tuple[int, ...]
    batch_size: int
    seed: int
    rank: int = 0
    ranks: int = 1

    def indices(self, step: int) -> Tensor:
        """The images of step 0, 1, …"""
        first = (step * self.ranks + self.rank) * self.batch_size
        length = sum(self.repeats)
        places = (divmod(first + i, length) for i in range(self.batch_size))
        return torch.stack([_epoch(self.repeats, self.seed, e)[place] for e, place in places])


@lru_cache(maxsize=4)
def _epoch(repeats: tuple[int, ...], seed: int, epoch: int) -> Tensor:
    shown = torch.repeat_interleave(torch.arange(len(repeats)), torch.tensor(repeats))
    return shown[torch.randperm(len(shown), generator=generator(seed, "order", epoch))]


class Batch(NamedTuple):
    """One step's input."""

    step: int
    indices_B: Tensor  # which images
    latents_BCHW: Tensor
    noise_BCHW: Tensor
    timesteps_B: Tensor
    sizes: Sizes
    text: dict[str, Tensor]  # B rows of each of the cache's
    # Factors of the squared errors, (B, 1, H, W) or (B, 1, 1, 1): masks, and prior images' weight.
    weights: Tensor | None = None  # None: 1
    prior_B: Tensor | None = None  # which only keep the model from forgetting; None: none
    perturbation_BCHW: Tensor | None = None  # of the noise as the denoiser sees it; None: 0
    part: int = 0  # which of the parts of the step's samples this is
    last: bool = True  # that this process sees of the step


def draw(cache: Cache, order: Order, step: int, *, timesteps: int, caption_dropout: float) -> Batch:
    """The batch of `step`. `timesteps`: how many there are to draw from."""
    indices_B = order.indices(step)

    def rng(what: str) -> torch.Generator:
        return generator(order.seed, what, step, order.rank)

    mean_BCHW = cache.latents.mean_NCHW[indices_B]
    shape = mean_BCHW.shape
    deviation_BCHW = cache.latents.std_NCHW[indices_B] * torch.randn(shape, generator=rng("latent"))
    dropped_B = torch.rand(len(indices_B), generator=rng("dropout")) < caption_dropout
    empty = len(next(iter(cache.text.values()))) - 1
    captions_B = torch.where(dropped_B, empty, indices_B)
    return Batch(
        step=step,
        indices_B=indices_B,
        latents_BCHW=mean_BCHW + deviation_BCHW,
        noise_BCHW=torch.randn(shape, generator=rng("noise")),
        timesteps_B=torch.randint(timesteps, (len(indices_B),), generator=rng("timestep")),
        sizes=cache.sizes.rows(indices_B),
        text={name: rows[captions_B] for name, rows in cache.text.items()},
    )


@dataclass(frozen=True)
class Batches:
    """The batches of steps `start` to `stop`, `stop` not included; iterable again and again."""

    cache: Cache
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
                self.cache,
                self.order,
                step,
                timesteps=self.timesteps,
                caption_dropout=self.caption_dropout,
            )
