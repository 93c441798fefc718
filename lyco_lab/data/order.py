"""Which images each step shows, as a pure function of (seed, step, rank).

A step's batch of B samples on each of R processes is one of G = B R samples that all have one size,
so that results depend on B R and not on R. Each bucket b has its images, each as often as its
repeats say, shuffled, and such epochs laid end to end; a batch is the next G of them, so all
batches are full however few images there are. With n_b samples to an epoch of bucket b, its batches
number

    K_b(e) = ceil(e n_b / G)        in the first e epochs

and those of epoch e, K_b(e) to K_b(e + 1), lie between the steps sum_b K_b(e) and
sum_b K_b(e + 1), shuffled among the buckets. So after e epochs every image was shown e times its
repeats, and of each bucket fewer than G samples of the next epoch.

Prior images take a fixed share s of the places: of the first p places of a bucket floor(p s), so
that whole batches differ by one at most. An epoch is one of the other images, in (1 - s) G of a
batch's places.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lyco_lab.seeds import generator

KEPT = 16  # shuffled epochs that are held in memory
Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Order:
    """`ranks` processes share a step's images, `rank` is ours.

    `buckets`: the bucket of each image; None: all have one. `prior`: which images are prior ones,
    `prior_share` of the places being theirs.
    """

    repeats: Sequence[int] | Numbers
    batch_size: int
    seed: int
    rank: int = 0
    ranks: int = 1
    buckets: Sequence[int] | Numbers | None = None
    prior: Sequence[bool] | NDArray[np.bool_] | None = None
    prior_share: Fraction = Fraction(0)
    _epochs: dict[tuple[int, str, int], Tensor] = field(default_factory=dict, repr=False)

    @property
    def together(self) -> int:
        """G, the samples of a step on all processes."""
        return self.batch_size * self.ranks

    @cached_property
    def streams(self) -> list["Stream"]:
        repeats = np.asarray(self.repeats, np.int64)
        buckets = np.zeros(len(repeats), np.int64) if self.buckets is None else self.buckets
        buckets = np.asarray(buckets, np.int64)
        prior = np.zeros(len(repeats), bool) if self.prior is None else np.asarray(self.prior)
        found = []
        for bucket in np.unique(buckets[~prior]).tolist():
            here = buckets == bucket
            images, priors = np.flatnonzero(here & ~prior), np.flatnonzero(here & prior)
            if self.prior_share and not len(priors):
                raise ValueError(f"bucket {bucket} has no prior images")
            found.append(Stream(bucket, images, repeats[images], priors, repeats[priors]))
        return found

    @property
    def samples_per_epoch(self) -> int:
        return sum(stream.length for stream in self.streams)

    @property
    def single(self) -> bool:
        """Whether there is one bucket, whose batches need no schedule."""
        return len(self.streams) == 1

    def indices(self, step: int) -> Tensor:
        """The images of step 0, 1, … on this process."""
        stream, batch = self.place(step)
        first = batch * self.together + self.rank * self.batch_size
        return torch.stack([self._image(stream, first + i) for i in range(self.batch_size)])

    def place(self, step: int) -> tuple["Stream", int]:
        """The bucket of a step, and which of the bucket's batches it is."""
        if self.single:
            return self.streams[0], step
        epoch = self._epoch_of(step)
        labels, counts = self._labels(epoch)
        at = step - self._start(epoch)
        stream = int(labels[at])
        return self.streams[stream], self._batches(stream, epoch) + int(counts[at])

    def epoch(self, step: int) -> int:
        """The epoch that a step is of."""
        if not self.single:
            return self._epoch_of(step)
        return self._others(step * self.together) // self.streams[0].length

    def _start(self, epoch: int) -> int:
        """The first step of an epoch."""
        return sum(self._batches(i, epoch) for i in range(len(self.streams)))

    def _batches(self, stream: int, epoch: int) -> int:
        """K_b(e): the first batch all of whose places that are not prior ones are of epoch e on."""
        shown = epoch * self.streams[stream].length
        if shown == 0:
            return 0
        return math.floor((shown - 1) / (self.together * (1 - self.prior_share))) + 1

    def _epoch_of(self, step: int) -> int:
        low, high = 0, 1
        while self._start(high) <= step:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._start(middle) <= step else (low, middle)
        return low

    def _labels(self, epoch: int) -> tuple[Tensor, Tensor]:
        """For each step of an epoch: its bucket, and how many of that bucket's came before."""
        if (found := self._epochs.get((epoch, "buckets", 0))) is None:
            counts = [
                self._batches(i, epoch + 1) - self._batches(i, epoch)
                for i in range(len(self.streams))
            ]
            labels = torch.repeat_interleave(torch.tensor(counts))
            rng = generator(self.seed, "buckets", epoch)
            labels = labels[torch.randperm(len(labels), generator=rng)]
            before = torch.empty_like(labels)
            for i in range(len(counts)):
                before[labels == i] = torch.arange(counts[i])
            found = self._keep((epoch, "buckets", 0), torch.stack([labels, before]))
        return found[0], found[1]

    def _others(self, place: int) -> int:
        """How many of the first places are not prior ones."""
        return place - self._priors(place)

    def _priors(self, place: int) -> int:
        return math.floor(place * self.prior_share)

    def _image(self, stream: "Stream", place: int) -> Tensor:
        if self._priors(place + 1) > self._priors(place):
            epoch, at = divmod(self._priors(place), stream.priors_length)
            return self._shuffled(stream, "prior", epoch)[at]
        epoch, at = divmod(self._others(place), stream.length)
        return self._shuffled(stream, "order", epoch)[at]

    def _shuffled(self, stream: "Stream", what: str, epoch: int) -> Tensor:
        if (found := self._epochs.get((stream.bucket, what, epoch))) is None:
            images, times = (
                (stream.images, stream.repeats)
                if what == "order"
                else (stream.priors, stream.priors_repeats)
            )
            shown = torch.from_numpy(np.repeat(images, times))
            # One bucket draws as it did before there were buckets.
            parts = (what, epoch) if self.single else (what, stream.bucket, epoch)
            rng = generator(self.seed, *parts)
            found = shown[torch.randperm(len(shown), generator=rng)]
            found = self._keep((stream.bucket, what, epoch), found)
        return found

    def _keep(self, key: tuple[int, str, int], value: Tensor) -> Tensor:
        while len(self._epochs) >= KEPT + 3 * len(self.streams):
            self._epochs.pop(next(iter(self._epochs)))
        self._epochs[key] = value
        return value


@dataclass(frozen=True, eq=False)
class Stream:
    """One bucket's images and prior images."""

    bucket: int
    images: Numbers
    repeats: Numbers
    priors: Numbers
    priors_repeats: Numbers

    @cached_property
    def length(self) -> int:
        """n_b, the samples of an epoch."""
        return int(self.repeats.sum())

    @cached_property
    def priors_length(self) -> int:
        return int(self.priors_repeats.sum())


def arithmetic(
    images: int,
    samples: int,
    *,
    batch_size: int,
    accumulation: int = 1,
    ranks: int = 1,
    prior_share: Fraction = Fraction(0),
    steps: int,
) -> str:
    """What a step is, in a line: images, repeats, batches, processes and epochs.

    A step is one of the optimizer, whatever it gathers its gradient from.
    """
    together = batch_size * accumulation * ranks
    own = together * (1 - prior_share)
    per_epoch = samples / own
    words = [f"{images} images, {samples} samples per epoch with repeats"]
    parts = [f"batch {batch_size}"]
    parts += [f"accumulation {accumulation}"] * (accumulation > 1)
    parts += [f"processes {ranks}"] * (ranks > 1)
    parts += [f"share of prior images {prior_share}"] * bool(prior_share)
    said = f"{float(own):g} of them per step ({' x '.join(parts)})"
    rate = f"{float(per_epoch):.6g} steps per epoch"
    words += [said, rate, f"{steps} steps = {float(steps / per_epoch):.4g} epochs"]
    return "; ".join(words)
