"""What a run trains on: batches with the noise that its settings ask for.

The samples of a step, G of them, are drawn together. They are cut into `accumulate` micro-batches,
each of which is shared by R processes: all in all into `accumulate` R parts of one size, of which a
process sees every R-th. So a step sees the same however many parts there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lyco_lab.config import Train
from lyco_lab.data.batches import Batch, Batches, Material, Order
from lyco_lab.diffusion.objective import Objective
from lyco_lab.train import noise


def parts(settings: Train, rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """Samples of a part, which part, of how many: for each micro-batch that this process sees."""
    size, micro_batches = settings.batch_size // ranks, settings.accumulate
    return [(size, micro * ranks + rank, micro_batches * ranks) for micro in range(micro_batches)]


@dataclass(frozen=True)
class Feed:
    """The micro-batches of steps `first` to the last; iterable again and again."""

    settings: Train
    objective: Objective
    material: Material
    orders: Sequence[Order]  # of each micro-batch of a step
    first: int

    def __len__(self) -> int:
        return (self.settings.steps - self.first) * len(self.orders)

    def __iter__(self) -> Iterator[Batch]:
        micro_batches = [
            Batches(
                self.material,
                order,
                self.first,
                self.settings.steps,
                timesteps=self.objective.timesteps,
                caption_dropout=self.settings.caption_dropout,
            )
            for order in self.orders
        ]
        for step in zip(*micro_batches, strict=True):
            for order, batch in zip(self.orders, step, strict=True):
                last = order is self.orders[-1]
                batch = noise.drawn(self.settings, self.objective, batch, order)
                yield batch._replace(part=order.rank, last=last)
