"""The steps of a run, by Lightning's Trainer."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as lightning
from lightning.pytorch.plugins.environments import LightningEnvironment

from lyco_lab.config import Run
from lyco_lab.data.batches import Order
from lyco_lab.data.cache import Cache
from lyco_lab.data.stored import Stored
from lyco_lab.progress import Bar
from lyco_lab.train.callbacks import Steps
from lyco_lab.train.feed import Feed, parts
from lyco_lab.train.module import Training
from lyco_lab.train.recompute import recomputing
from lyco_lab.train.validation import split


def fit(
    run: Run,
    module: Training,
    shown: Cache | Stored,
    first: int,
    between: list[lightning.Callback],
) -> None:
    """Steps `first` to the last."""
    again = list(module.mounted) if run.train.gradient_checkpointing else []
    with (
        quiet(),
        recomputing([module.diffusion.parts[part] for part in again]),
        Bar(f"{run.name}: train", run.train.steps, first) as bar,
    ):
        trainer = lightning.Trainer(
            accelerator=module.diffusion.denoiser.device.type,
            devices=1,
            accumulate_grad_batches=run.train.accumulate,
            max_epochs=1,  # the batches are one long epoch, from `first` to the end
            callbacks=[*between, Steps(bar)],
            plugins=[LightningEnvironment()],  # one process, whatever cluster it runs on
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        each = orders(run, shown, trainer.global_rank, trainer.world_size)
        feed = Feed(run.train, module.diffusion.objective, shown, each, first)
        trainer.fit(module, train_dataloaders=feed)


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
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        logger.setLevel(before)
