"""What a run trains on: batches with the noise that its settings ask for."""

from collections.abc import Iterator
from dataclasses import dataclass

from lyco_lab.config import Train
from lyco_lab.data.batches import Batch, Batches, Material, Order
from lyco_lab.diffusion.objective import Objective
from lyco_lab.train import noise


@dataclass(frozen=True)
class Feed:
    """The batches of steps `first` to the last; iterable again and again."""

    settings: Train
    objective: Objective
    material: Material
    order: Order
    first: int

    def __len__(self) -> int:
        return self.settings.steps - self.first

    def __iter__(self) -> Iterator[Batch]:
        batches = Batches(
            self.material,
            self.order,
            self.first,
            self.settings.steps,
            timesteps=self.objective.timesteps,
            caption_dropout=self.settings.caption_dropout,
        )
        for batch in batches:
            yield noise.drawn(self.settings, self.objective, batch, self.order)
