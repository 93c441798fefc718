"""What a run did: its loss and every layer's W' - W, after every step.

Of each W' - W a digest is kept, which two equal ones share in every bit and no others do; at a few
steps also its entries, at most `ENTRIES` of a layer, for the distance of two that are not equal.
The last entry is what would be exported, which differs from what trains where it is averaged.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from lyco_lab.config import Model, Run
from lyco_lab.data.batches import Batch
from lyco_lab.data.cache import Cache
from lyco_lab.data.folder import Dataset
from lyco_lab.data.stage import material
from lyco_lab.data.stored import Stored
from lyco_lab.diffusion.model import Diffusion
from lyco_lab.errors import Interrupted
from lyco_lab.seeds import generator
from lyco_lab.train import stage
from lyco_lab.train.callbacks import Stop
from lyco_lab.train.guard import NotFinite
from lyco_lab.train.module import Training

ENTRIES = 2**16


@dataclass
class Trace:
    """Of steps 1, 2, ..., in lists that begin with the first."""

    layers: tuple[str, ...] = ()
    losses: list[float] = field(default_factory=list)
    digests: list[tuple[bytes, ...]] = field(default_factory=list)  # a row has one per layer
    values: dict[int, list[Tensor]] = field(default_factory=dict)  # step -> one per layer
    exported: tuple[bytes, ...] = ()
    stopped: str = ""  # why it ended early

    @property
    def steps(self) -> int:
        return len(self.losses)


def looks(steps: int) -> list[int]:
    """The steps whose entries are kept: 1, 2, 4, ..., and the last."""
    return sorted({*(2**n for n in range(steps.bit_length()) if 2**n < steps), steps})


@dataclass
class Recorder(lightning.Callback):
    """Writes the trace; ends the training after step `until`, where that is given."""

    trace: Trace
    steps: int
    until: int | None
    stop: Stop

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not batch.last:
            return
        done = batch.step + 1
        self.trace.losses.append(module.row["loss"])
        deltas = deltas_of(module)
        self.trace.digests.append(digests(deltas))
        if done in looks(self.steps) or done == self.until:
            self.trace.values[done] = [spread(delta) for delta in deltas]
        if self.stop.asked:
            raise Interrupted("nothing of a verification is kept", self.stop.asked)
        trainer.should_stop = done == self.until


@torch.no_grad()
def deltas_of(module: Training) -> list[Tensor]:
    return [m.delta(name) for m in module.mounted.values() for name in m.layers]


def digests(deltas: list[Tensor]) -> tuple[bytes, ...]:
    arrays = (delta.detach().cpu().contiguous().numpy() for delta in deltas)
    return tuple(hashlib.blake2b(array.data, digest_size=16).digest() for array in arrays)


def spread(delta: Tensor) -> Tensor:
    """At most `ENTRIES` of the entries, from all over."""
    flat = delta.detach().flatten()
    stride = -(-len(flat) // ENTRIES)
    # An odd stride meets all columns of a matrix whose rows are a power of two.
    return flat[:: stride + (stride > 1 and stride % 2 == 0)].cpu().clone()


@dataclass
class Rounding(lightning.Callback):
    """Moves what a step computes with by one rounding, to see what training makes of that.

    Each entry of each factor is off by half a unit in the last place, up or down at random, while
    the gradient is computed, and so is each entry of the gradient. Numbers that all entries share,
    gamma and the learning rate, are rounded too: so all entries of a factor are together off by as
    much once more, and so is its step. `unit` is that of the coarsest numbers that a step computes
    with.
    """

    unit: float
    seed: int
    number: int  # of several such runs
    kept: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, batch_idx: int) -> None:
        self.rng = generator(self.seed, "rounding", batch.step, self.number)
        factors = list(module.factors().values())
        self.kept = [factor.detach().clone() for factor in factors]
        for factor in factors:
            self.round(factor)

    @torch.no_grad()
    def on_after_backward(self, trainer: Any, module: Any) -> None:
        for factor, kept in zip(module.factors().values(), self.kept, strict=True):
            factor.copy_(kept)
            if factor.grad is not None:
                self.round(factor.grad)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        for factor, kept in zip(module.factors().values(), self.kept, strict=True):
            factor.add_((factor - kept) * self.unit * self.ups(1))

    def round(self, tensor: Tensor) -> None:
        tensor.mul_(1 + self.unit * self.ups(*tensor.shape).to(tensor))
        tensor.mul_(1 + self.unit * self.ups(1).to(tensor))

    def ups(self, *shape: int) -> Tensor:
        """Half up or half down, at random."""
        return torch.randint(2, shape, generator=self.rng) - 0.5


class Bench:
    """The images, and the model that was used last, ready to be trained on."""

    def __init__(self, images: Dataset) -> None:
        self.images = images
        self.held: tuple[Model, Diffusion, Cache | Stored] | None = None

    def of(self, run: Run) -> tuple[Diffusion, Cache | Stored]:
        # Which layers are adapted is another matter.
        key = replace(run.model, preset="full", train_norm=False)
        if self.held is None or self.held[0] != key:
            self.held = None  # two full models may not fit
            diffusion = stage.frozen(run)
            self.held = (key, diffusion, material(run, self.images, diffusion))
        return self.held[1], self.held[2]


def follow(
    run: Run,
    bench: Bench,
    *,
    strength: float = 1.0,
    unit: float | None = None,
    number: int = 0,
    until: int | None = None,
) -> Trace:
    """Train as a run does, and say what happened.

    `unit`: that of the roundings to be made; `number`: of a run with such, each has its own.
    """
    stop, trace = Stop(), Trace()
    with stage.exact(None), mounted(run, bench, strength) as (module, cached):
        trace.layers = tuple(f"{part}.{n}" for part, m in module.mounted.items() for n in m.layers)
        between: list[lightning.Callback] = []
        if unit is not None:
            between.append(Rounding(unit, run.seed, number))
        between.append(Recorder(trace, run.train.steps, until, stop))
        try:
            with stop.listening():
                stage.fit(run, module, cached, 0, between)
        except NotFinite as error:
            trace.stopped = str(error)
        else:
            with module.exported():
                trace.exported = digests(deltas_of(module))
    return trace


@contextmanager
def mounted(run: Run, bench: Bench, strength: float) -> Iterator[tuple[Training, Cache | Stored]]:
    """The run's adapter on the bench's model; the model as it was afterwards."""
    diffusion, cached = bench.of(run)
    held = stage.mount(run, diffusion)
    try:
        for one in held.values():
            one.strength = strength
        yield Training(diffusion, held, run.train, run.optimizer_value()), cached
    finally:
        for one in held.values():
            one.detach()
