"""The steps of a run, by Lightning's Trainer."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lyco_lab.config import Run
from lyco_lab.data.batches import Order
from lyco_lab.data.cache import Cache
from lyco_lab.data.stored import Stored
from lyco_lab.errors import UserError
from lyco_lab.progress import Bar
from lyco_lab.train.callbacks import Steps
from lyco_lab.train.feed import Feed, parts
from lyco_lab.train.module import Training
from lyco_lab.train.plugged import Plugged, count_from
from lyco_lab.train.processes import Environment, Process, agree
from lyco_lab.train.recompute import recomputing
from lyco_lab.train.sharing import Sharing
from lyco_lab.train.validation import split


def fit(
    run: Run,
    module: Training,
    shown: Cache | Stored,
    first: int,
    between: list[lightning.Callback],
    process: Process | None = None,
    plugged: Plugged | None = None,
) -> None:
    """Steps `first` to the last, with other processes if this is one of several.

    `plugged`: whose callbacks are `between` the others already.
    """
    process, plugged = process or Process(), plugged or Plugged()
    passed = dict.fromkeys([*module.mounted, *module.words])  # by gradients
    again = passed if run.train.gradient_checkpointing else {}
    with (
        quiet(),
        recomputing([module.diffusion.parts[part] for part in again]),
        Bar(f"{run.name}: train", run.train.steps, first) as bar,
    ):
        each = orders(run, shown, process.rank, process.ranks)
        feed = Feed(run.train, module.diffusion.objective, shown, each, first)
        trainer = lightning.Trainer(
            accelerator=module.diffusion.denoiser.device.type,
            devices=process.ranks,
            strategy="auto" if process.alone else averaging(run, module, feed),
            accumulate_grad_batches=run.train.accumulate,
            max_epochs=1,  # the batches are one long epoch, from `first` to the end
            callbacks=[*between, Steps(bar)],
            plugins=[Environment(process)],
            logger=plugged.loggers or False,
            log_every_n_steps=1 if plugged else None,
            default_root_dir=plugged.folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        # Lightning would answer SIGTERM by an exit with code 0 that saves nothing (callbacks.Stop).
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if plugged:
            count_from(trainer, first)
        try:
            trainer.fit(module, train_dataloaders=feed)
            if not agree(module.digest()):
                raise UserError(
                    "the processes that trained together ended with factors that differ: a device "
                    "computes wrongly, or not the same twice; delete the run's folder, and train "
                    "on fewer with trainer.devices"
                )
        except MisconfigurationException as error:
            raise UserError(f"Lightning says of trainer.callbacks or loggers: {error}") from error
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def averaging(run: Run, module: Training, feed: Feed) -> DDPStrategy:
    """How several processes share their gradients."""
    strategy = run.trainer.strategy

    def idle() -> bool:
        # Some families use what comes before a text encoder's last layer, which so has no effect.
        return run.reads_texts and module.has_idle_factors(next(iter(feed)))

    if strategy == "fsdp":
        return Sharing(idle, broadcast_buffers=False)
    unused = idle() if strategy == "auto" else strategy.endswith("_true")
    return DDPStrategy(find_unused_parameters=unused, broadcast_buffers=False)


def orders(run: Run, shown: Cache | Stored, rank: int = 0, ranks: int = 1) -> list[Order]:
    """Which images are trained on, for each micro-batch of a step."""
    found = [
        shown.order(size, run.seed, part, count)
        for size, part, count in parts(run.train, rank, ranks)
    ]
    share = run.train.validation_share
    return found if share is None else [split(order, share)[0] for order in found]


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on hardware, settings and products."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
