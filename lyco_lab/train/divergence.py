"""When a run is stopped because it gets worse and worse.

A check looks at the validation loss, or where there is none, at the mean of the training losses
since the last check. It is bad if that exceeds `factor` times the least that was ever seen, and
`checks` bad ones in a row end the run. What was seen is in metrics.csv: a run that goes on sees it
again, and nothing has to be saved.
"""

from dataclasses import dataclass, field
from pathlib import Path

from lyco_lab.config import Train
from lyco_lab.errors import UserError
from lyco_lab.train.journal import column


class Diverged(UserError):
    """Losses that grew; what was saved before is kept."""


@dataclass
class Divergence:
    settings: Train
    best: float = float("inf")
    best_step: int = 0
    bad: int = 0  # checks in a row
    losses: list[float] = field(default_factory=list)  # of training, since the last check

    @classmethod
    def of(cls, settings: Train, journal: Path, step: int) -> "Divergence":
        """As it was after `step` steps, by their rows."""
        found = cls(settings)
        losses = column(journal, "loss", step)
        validated = column(journal, "validation_loss", step)
        for number, loss in losses.items():
            found.see(number, loss, validated.get(number))
        return found

    def see(self, step: int, loss: float, validation_loss: float | None) -> None:
        """Raise an error if it is time to stop."""
        factor = self.settings.stop_on_divergence
        if factor is None:
            return
        self.losses.append(loss)
        if step % self.settings.check_every:
            return
        mean = sum(self.losses) / len(self.losses)
        value = mean if validation_loss is None else validation_loss
        self.losses.clear()
        self.bad = self.bad + 1 if value > factor * self.best else 0
        if value < self.best:
            self.best, self.best_step = value, step
        if self.bad >= self.settings.checks:
            which = "mean training loss" if validation_loss is None else "validation loss"
            raise Diverged(
                f"the {which} is {value:.4g} at step {step}, and was more than {factor:g} times "
                f"its best, {self.best:.4g} at step {self.best_step}, at {self.bad} checks in a "
                f"row: training stopped; try a smaller train.lr than {self.settings.lr}, or a "
                "larger train.stop_on_divergence"
            )
