"""The loss on images that are not trained on, always with the same noise at the same timesteps.

Of n images each is seen at K timesteps. The n K strata of equal probability, as the run draws its
timesteps, are dealt out so that each has one image, in its middle: the mean has none of the noise
that makes training losses jump, and two of them can be compared. Which images are held out, the
noise, and which image has which stratum are the same for every seed and every run of these images.
Captions are whole, images neither mirrored nor moved, factors those that would be exported.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lyco_lab import waits
from lyco_lab.data.batches import Batch, Material, Order
from lyco_lab.errors import UserError
from lyco_lab.seeds import derive, generator
from lyco_lab.train import noise

SEED = 0  # whatever the run's
LEAST_DRAWS, LEAST_LOSSES = 4, 32  # timesteps of an image; losses in the mean


def split(order: Order, share: float) -> tuple[Order, list[int]]:
    """The order without the images that are held out, and those.

    Each size that is trained at keeps one; prior images are no part of the concept, and stay.
    """
    repeats = np.array(order.repeats, np.int64)
    count = len(repeats)
    buckets = np.zeros(count, np.int64) if order.buckets is None else np.asarray(order.buckets)
    prior = np.zeros(count, bool) if order.prior is None else np.asarray(order.prior)
    ours = np.flatnonzero(~prior)
    wanted = max(1, round(share * len(ours)))
    left = dict(zip(*np.unique(buckets[ours], return_counts=True), strict=True))
    held: list[int] = []
    for place in torch.randperm(len(ours), generator=generator(SEED, "held out")).tolist():
        image = int(ours[place])
        if len(held) < wanted and left[buckets[image]] > 1:
            held.append(image)
            left[buckets[image]] -= 1
    if not held:
        raise UserError(
            f"train.validation_share is {share}, but no image can be held out: each of the sizes "
            f"that the {len(ours)} images are trained at has one image only; use "
            "train.validation_folder"
        )
    repeats[held] = 0
    return replace(order, repeats=repeats, _epochs={}), sorted(held)


@dataclass(frozen=True)
class Validation:
    """What is seen at each check."""

    material: Material
    order: Order  # for the images' sizes
    images: list[int]
    batch_size: int

    @property
    def draws(self) -> int:
        """K."""
        return max(LEAST_DRAWS, -(-LEAST_LOSSES // len(self.images)))

    @torch.no_grad()
    def loss(self, module: Any) -> float:
        """The mean over all images and their timesteps, of the module as it would be exported."""
        found = []
        with module.exported():
            for mounted in module.mounted.values():
                mounted.eval()
            for batch in self.batches(module):
                moved = module.transfer_batch_to_device(batch, module.device, 0)
                found.append((module.loss(moved), len(batch.indices_B)))
        losses = waits.host(torch.stack([loss for loss, _ in found]), "validation").tolist()
        total = 0.0
        for loss, (_, count) in zip(losses, found, strict=True):
            total += loss * count
        return total / (len(self.images) * self.draws)

    def batches(self, module: Any) -> Iterator[Batch]:
        """All of them, each of images of one size."""
        at = self.timesteps(module)
        pairs = [(image, draw) for image in self.images for draw in range(self.draws)]
        sizes = self.order.buckets
        if sizes is not None:
            pairs.sort(key=lambda pair: int(sizes[pair[0]]))  # keeps the order within a size
        while pairs:
            size = None if sizes is None else sizes[pairs[0][0]]
            same = [p for p in pairs[: self.batch_size] if sizes is None or sizes[p[0]] == size]
            del pairs[: len(same)]
            yield self._batch(same, torch.tensor([at[pair] for pair in same]))

    def timesteps(self, module: Any) -> dict[tuple[int, int], int]:
        """Of each image, by the number of its draw."""
        n, draws = len(self.images), self.draws
        found: dict[tuple[int, int], int] = {}
        for draw in range(draws):
            order = torch.randperm(n, generator=generator(SEED, "strata", draw)).tolist()
            u_N = (draw * n + torch.tensor(order, dtype=torch.float64) + 0.5) / (n * draws)
            t_N = noise.quantiles(module.settings, module.diffusion.objective, u_N)
            found |= {(image, draw): t for image, t in zip(self.images, t_N.tolist(), strict=True)}
        return found

    def _batch(self, pairs: list[tuple[int, int]], timesteps_B: Tensor) -> Batch:
        indices_B = torch.tensor([image for image, _ in pairs])
        never = torch.zeros(len(pairs), dtype=torch.bool)
        found = self.material.pictures(indices_B, never, torch.full((len(pairs), 2), 0.5))
        mean_BCHW, _ = found.latents
        noise_BCHW = torch.stack([
            torch.randn(mean_BCHW.shape[1:], generator=generator(SEED, "validation", *pair))
            for pair in pairs
        ])  # fmt: skip
        return Batch(
            step=0,
            indices_B=indices_B,
            latents_BCHW=mean_BCHW,
            noise_BCHW=noise_BCHW,
            timesteps_B=timesteps_B,
            sizes=found.sizes,
            text=self.material.texts(
                indices_B, never, lambda place: derive(SEED, "caption", *pairs[place])
            ),
            weights=found.weights,
        )
