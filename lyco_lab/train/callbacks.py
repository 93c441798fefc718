"""What happens between two steps: a validation, a row, samples, a check, a checkpoint, a stop.

A step can have several batches (feed.py): only the last of them ends it.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lyco_lab.config import Run
from lyco_lab.data.batches import Batch
from lyco_lab.diffusion.base import NoPicture
from lyco_lab.diffusion.memory import AtOnce, NoMemory
from lyco_lab.errors import Interrupted
from lyco_lab.files import atomic
from lyco_lab.interrupts import answering
from lyco_lab.progress import Bar
from lyco_lab.tracking import Tracker
from lyco_lab.train import guard
from lyco_lab.train.checkpoint import Checkpoints, State, write
from lyco_lab.train.divergence import Divergence
from lyco_lab.train.exact import Exactness
from lyco_lab.train.journal import Journal, Row
from lyco_lab.train.plugged import Plugged
from lyco_lab.train.validation import Validation

NORM_EVERY = 10  # steps; a norm needs every layer's W' - W, which costs about a tenth of a step
SAMPLES = 4  # images in a grid


@dataclass
class Validating(lightning.Callback):
    """Every `validate_every` steps, the loss on what is not trained on; for the step's row."""

    validation: Validation
    every: int

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch.last and (batch.step + 1) % self.every == 0:
            module.row["validation_loss"] = self.validation.loss(module)


@dataclass
class Norms(lightning.Callback):
    """Every `NORM_EVERY` steps, the norm of what has changed; for the step's row."""

    steps: int

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if batch.last and (done % NORM_EVERY == 0 or done == self.steps):
            module.row["delta_norm"] = module.delta_norm()


@dataclass
class Watching(lightning.Callback):
    """Ends a run that diverges, before its state is saved."""

    divergence: Divergence

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch.last:
            row = module.row
            self.divergence.see(row["step"], row["loss"], row.get("validation_loss"))


@dataclass
class Rows(lightning.Callback):
    """A line in metrics.csv, and in W&B, for every step."""

    journal: Journal
    tracker: Tracker

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch.last:
            self.journal.write(module.row)
            self.tracker.log(batch.step + 1, shown(module.row))


def shown(row: Row) -> dict[str, float]:
    """A row of metrics.csv as W&B is told it."""
    named = {
        "train/loss": row["loss"],
        "train/grad_norm": row["grad_norm"],
        "train/delta_norm": row.get("delta_norm"),
        "lr/unet": row["lr"],
        "lr/text_encoder": row["lr_text_encoder"],
        "validation/loss": row.get("validation_loss"),
    }
    return {key: value for key, value in named.items() if value is not None}


@dataclass
class Samples(lightning.Callback):
    """Every `sample_every` steps, images of the first captions, always from the same noise.

    If not even one fits into memory beside what trains, there are none from then on.
    """

    run: Run
    captions: Sequence[str]
    folder: Path
    tracker: Tracker
    at_once: AtOnce = field(default_factory=AtOnce)
    fit: bool = True

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        done, every = batch.step + 1, self.run.train.sample_every
        if every is None or done % every or not batch.last or not self.fit:
            return
        prompts = list(dict.fromkeys(self.captions))[:SAMPLES]
        how = self.run.generate
        try:
            with module.exported():
                images = module.diffusion.sample(
                    prompts,
                    [how.seed + i for i in range(len(prompts))],
                    steps=how.steps,
                    guidance=how.guidance,
                    at_once=self.at_once,
                )
        except NoMemory as error:
            self.fit = False
            print(f"{error}: training goes on without samples from step {done} on")
            return
        except NoPicture as error:  # a look on the way, of which nothing depends
            print(f"{self.run.name}: no samples of step {done}: {error}")
            return
        row = side_by_side(images)
        with atomic(self.folder / f"step{done:08d}.png") as temporary:
            Image.fromarray(row).save(temporary, format="PNG")
        self.tracker.image("samples", row, f"step {done}: " + " | ".join(prompts), done)


def side_by_side(images_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate(list(images_NHWC), axis=1)


@dataclass
class Stop:
    """Which signal, if any, has asked for an end. The step that is running is finished first."""

    asked: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While steps are made; nothing that could be lost may begin before or follow after."""

        def ask(number: int) -> None:
            self.asked = number

        with answering(ask):
            yield
        if self.asked:
            raise Interrupted("training has made its last step, which is saved", self.asked)


@dataclass
class Saving(lightning.Callback):
    """Checkpoints: every so often, at the end, and when asked to stop."""

    checkpoints: Checkpoints
    journal: Journal
    stop: Stop
    exactness: Exactness
    plugged: Plugged
    every: int
    steps: int
    seconds: float = 0.0  # of earlier sittings
    trained: bytes = b""  # digest of the factors to be exported, as the last step left them
    _began_s: float = field(default_factory=time.monotonic)

    def total_seconds(self) -> float:
        return self.seconds + time.monotonic() - self._began_s

    def state(self, module: Any, done: int) -> State:
        return replace(
            module.state(done, self.total_seconds()),
            nondeterministic=tuple(sorted(self.exactness.operations)),
            callbacks=self.plugged.state(),
            ended=module.trainer.should_stop,
            rows=self.journal.digest,
        )

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not batch.last:
            return
        done = batch.step + 1
        last = done == self.steps or trainer.should_stop
        if done % self.every == 0 or last or self.stop.asked:
            self.journal.sync()
            self.checkpoints.save(self.state(module, done))
        if last:
            self.trained = module.exported_digest()
        if self.stop.asked:
            said = f"training stopped after step {done} of {self.steps}, which is saved"
            raise Interrupted(said, self.stop.asked)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if isinstance(exception, guard.NotFinite):
            done = int(module.row["step"] or 1) - 1
            path = self.checkpoints.folder.parent / guard.FILE
            write(path, self.state(module, done))


@dataclass
class Steps(lightning.Callback):
    """Moves the bar, with the loss beside it."""

    bar: Bar

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch.last:
            self.bar.advance(f"loss {module.row['loss']:.4f}")
