"""Callbacks and loggers that a run names, beside its own.

    trainer:
      loggers: [{class_path: lightning.pytorch.loggers.CSVLogger}]
      callbacks: [{class_path: mine.Watch, init_args: {every: 5}}]

They find the columns of train/metrics.csv in `trainer.callback_metrics`, of the step that has just
ended, and loggers count steps as it does. A validation calls `on_validation_end`, as Lightning's
own would. A callback may stop the run: it has then fewer steps, and is done. What a callback says
of its state is in the checkpoints.

Some kinds of callbacks are refused (`REFUSED`): those that exchange or prune the weights, freeze
them, search for a learning rate or a batch size, or change how gradients are accumulated. They
would overrule settings of the run, or export factors that are not the ones that trained.

Of several processes each has the callbacks, and the first has the loggers.
"""

import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    ProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

from lyco_lab.config import Run
from lyco_lab.config.training import Plugin
from lyco_lab.data.batches import Batch
from lyco_lab.errors import UserError, nearest
from lyco_lab.train.journal import COLUMNS
from lyco_lab.user_classes import find_class

State = Mapping[str, Mapping[str, Any]]  # of each callback with one

# Base classes of callbacks that a run cannot have, and why; the first that fits is named.
REFUSED: dict[type[Callback], str] = {
    Checkpoint: "runs save themselves: train.checkpoint_every",
    StochasticWeightAveraging: "it exchanges the weights that trained for others: use "
    "train.ema_decay, or the optimizer schedulefree",
    WeightAveraging: "it exchanges the weights that trained for others: use train.ema_decay",
    ModelPruning: "it replaces parameters, so the factors that train would not be exported: use a "
    "smaller adapter.rank",
    BaseFinetuning: "it freezes and unfreezes parameters: which layers train is said by "
    "model.preset, and how fast by train.groups",
    GradientAccumulationScheduler: "it changes how many batches make a step: use train.accumulate",
    LearningRateFinder: "it trains on its own to search for a learning rate: set train.lr, or use "
    "the optimizer prodigy",
    BatchSizeFinder: "it trains on its own to search for a batch size: set train.batch_size",
    SpikeDetection: "it skips batches and ends the process: use train.stop_on_divergence",
    BasePredictionWriter: "nothing is predicted while training, so it would do nothing: leave it "
    "out",
    ProgressBar: "runs have a bar of their own: leave it out",
}


@dataclass
class Plugged:
    """What a run plugs in; falsy where that is nothing."""

    callbacks: list[Callback] = field(default_factory=list)
    loggers: list[Logger] = field(default_factory=list)
    folder: Path | None = None  # for what they write and were given no place for

    def __bool__(self) -> bool:
        return bool(self.callbacks or self.loggers)

    def around(self, state: State, every: int | None) -> list[Callback]:
        """The callbacks, and what comes before and after them in each step.

        `every`: the steps between two validations.
        """
        if not self:
            return []
        return [Telling(self.callbacks, state, every), *self.callbacks, Agreeing()]

    @property
    def named(self) -> str:
        """The callbacks' classes, as an error lists them."""
        return ", ".join(_path(type(callback)) for callback in self.callbacks)

    def state(self) -> dict[str, dict[str, Any]]:
        """What the callbacks have to remember, as a checkpoint can hold it."""
        found = {}
        for key, callback in _named(self.callbacks):
            state, buffer = callback.state_dict(), io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            try:
                torch.load(buffer, weights_only=True)
            except Exception as error:
                raise UserError(
                    f"the state of the callback {_path(type(callback))} cannot be kept: its "
                    "state_dict needs plain containers, numbers, text and tensors"
                ) from error
            if state:
                found[key] = state
        return found


def _named(callbacks: Sequence[Callback]) -> list[tuple[str, Callback]]:
    return [(f"{number} {c.state_key}", c) for number, c in enumerate(callbacks)]


def check(run: Run) -> None:
    """Raise the errors that can be seen without making anything."""
    _each(run, lambda cls, arguments: None)


def plugged(run: Run, folder: Path, rank: int = 0) -> Plugged:
    """What the process of this rank needs; loggers without a `save_dir` of their own write below
    `folder`."""

    def made(cls: type, arguments: dict[str, Any]) -> Any:
        if issubclass(cls, Logger):
            if rank:
                return DummyLogger()  # some callbacks insist on one
            if "save_dir" in inspect.signature(cls).parameters:
                arguments = {"save_dir": str(folder / "loggers"), **arguments}
        try:
            return cls(**arguments)
        except Exception as error:
            raise UserError(f"{_path(cls)} cannot be made of {arguments}: {error}") from error

    callbacks, loggers = _each(run, made)
    return Plugged(callbacks, loggers, folder)


def _each(run: Run, make: Callable[[type, dict[str, Any]], Any]) -> tuple[list[Any], list[Any]]:
    found: tuple[list[Any], list[Any]] = ([], [])
    kinds: tuple[tuple[str, type], ...] = (("callbacks", Callback), ("loggers", Logger))
    for into, (key, kind) in zip(found, kinds, strict=True):
        for number, plugin in enumerate(getattr(run.trainer, key), start=1):
            where = f"entry {number} of trainer.{key}"
            cls = _class(where, plugin.class_path, kind)
            into.append(make(cls, _arguments(run, where, cls, plugin)))
    return found


def _class(where: str, path: str, kind: type) -> type:
    hint = ""
    if path.startswith("pytorch_lightning"):
        hint = ": pytorch_lightning is another package of the same, write lightning.pytorch"
    cls = find_class(where, path, kind, f"lightning.pytorch {kind.__name__}{hint}")
    for refused, reason in REFUSED.items():
        if issubclass(cls, refused):
            of = "" if cls is refused else f" (a {refused.__name__})"
            raise UserError(f"{where} is {path!r}{of}, but {reason}")
    return cls


def _arguments(run: Run, where: str, cls: type, plugin: Plugin) -> dict[str, Any]:
    arguments, taken = dict(plugin.init_args), inspect.signature(cls).parameters
    every = inspect.Parameter.VAR_KEYWORD
    if not any(parameter.kind is every for parameter in taken.values()):
        for key in arguments:
            if key not in taken:
                raise UserError(
                    f"{where} gives {plugin.class_path} init_args.{key}, and it takes "
                    f"{', '.join(taken) or 'none'}{nearest(key, taken)}"
                )
    if issubclass(cls, EarlyStopping):
        if run.train.validate_every is None:
            raise UserError(
                f"{where} is {plugin.class_path!r}, which looks after each validation: needs "
                "train.validate_every"
            )
        if arguments.setdefault("check_on_train_epoch_end", False):
            raise UserError(
                f"{where} has init_args.check_on_train_epoch_end true, but a run is one epoch: it "
                "would look once all is over"
            )
    filled = {"save_dir": ""} if issubclass(cls, Logger) and "save_dir" in taken else {}
    try:
        inspect.signature(cls).bind(**filled | arguments)
    except TypeError as error:
        raise UserError(
            f"{where}: {plugin.class_path} has init_args {arguments}: {error}"
        ) from None
    return arguments


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@dataclass
class Telling(Callback):
    """Before the others: what the step has come to."""

    others: Sequence[Callback]
    state: State
    every: int | None

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        for key, callback in _named(self.others):
            if key in self.state:
                callback.load_state_dict(dict(self.state[key]))

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, batch_idx: int) -> None:
        module.set_rates(batch.step)  # before a callback looks at them

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not batch.last:
            return
        validated = self.every is not None and (batch.step + 1) % self.every == 0
        if validated and trainer.world_size > 1:  # the first alone may have looked
            value = module.row.get("validation_loss")
            module.row["validation_loss"] = trainer.strategy.broadcast(value)
        for key in COLUMNS[1:]:
            if (value := module.row.get(key)) is not None:
                module.log(key, value, batch_size=1)
        if validated:
            for callback in self.others:
                callback.on_validation_end(trainer, module)


@dataclass
class Agreeing(Callback):
    """After the others: all processes stop if one is to, and at the end of a step."""

    asked: bool = False

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, batch_idx: int) -> None:
        if trainer.accumulate_grad_batches != module.settings.accumulate:
            raise UserError(
                "a callback of trainer.callbacks has set accumulate_grad_batches to "
                f"{trainer.accumulate_grad_batches}: use train.accumulate, which is "
                f"{module.settings.accumulate}, and leave the callback out"
            )

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.asked |= trainer.should_stop
        if batch.last:
            self.asked = trainer.strategy.reduce_boolean_decision(self.asked, all=False)
        trainer.should_stop = batch.last and self.asked


def count_from(trainer: lightning.Trainer, first: int) -> None:
    """Have callbacks and loggers count the steps of earlier sittings, loggers from 1."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = first + 1
    steps = loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.ready = steps.completed = first
