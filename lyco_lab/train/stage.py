"""The stage: a run's images and a frozen model -> adapter.safetensors.

    train/metrics.csv         a row for each step
    train/checkpoints/        where a run that was stopped goes on from
    train/samples/            images drawn on the way, if asked for
    adapter.safetensors       the result

Everything is done on one device in the process it is called in.
"""

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from lyco_lab.adapters.mount import Mounted, attach
from lyco_lab.config import Run
from lyco_lab.config.groups import group_of
from lyco_lab.data.cache import Cache
from lyco_lab.data.folder import Dataset
from lyco_lab.data.stage import dataset, material
from lyco_lab.data.stored import Stored
from lyco_lab.diffusion import targets
from lyco_lab.diffusion.model import Diffusion, load
from lyco_lab.formats import kohya
from lyco_lab.miniature import placed
from lyco_lab.progress import Bar
from lyco_lab.record import Record
from lyco_lab.tracking import track
from lyco_lab.train.callbacks import Rows, Samples, Saving, Steps, Stop
from lyco_lab.train.checkpoint import Checkpoints
from lyco_lab.train.feed import Feed, parts
from lyco_lab.train.journal import Journal, rows_of
from lyco_lab.train.module import Training
from lyco_lab.train.recompute import recomputing

STAGE = "train"
ADAPTER = "adapter.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(run: Run, record: Record) -> None:
    """Train what is left of the run's steps and write its adapter."""
    if record.done(STAGE):
        return
    images = dataset(run, record)
    diffusion = frozen(run)
    mounted = mount(run, diffusion)
    module = Training(diffusion, mounted, run.train, run.optimizer_value())
    folder = record.path / STAGE
    checkpoints = Checkpoints(folder / "checkpoints")
    state = checkpoints.latest(rows_of(folder / "metrics.csv"))
    first = 0 if state is None else state.step
    if state is not None:
        module.load_state(state)
    stop = Stop()
    facts = {
        "trainable_params": sum(m.num_params for m in mounted.values()),
        "layers": {part: len(m.layers) for part, m in mounted.items()},
        "dataset_digest": record.facts("data")["digest"],
        "device": diffusion.denoiser.device.type,
    }
    with (
        exact(None if state is None else state.threads) as threads,
        Journal(folder / "metrics.csv", first) as journal,
        track(run, record, STAGE, facts | {"threads": threads}) as tracker,
        stop.listening(),
    ):
        saving = Saving(
            checkpoints,
            journal,
            stop,
            every=run.train.checkpoint_every,
            steps=run.train.steps,
            seconds=0.0 if state is None else state.seconds,
        )
        if first < run.train.steps:
            between = [
                Rows(journal, tracker, run.train.steps),
                Samples(run, images.captions, folder / "samples", tracker),
                saving,
            ]
            cached = seen(run, diffusion, images)
            if cached.cut_captions:
                print(
                    f"{cached.cut_captions} of {len(images.items)} captions are longer than the "
                    "text encoder reads, and are cut"
                )
            fit(run, module, cached, images.repeats, first, between)
        with module.exported():
            noted = metadata(run, images) | diffusion.described
            kohya.save(record.path / ADAPTER, mounted, noted)
        tracker.file(record.path / ADAPTER, f"adapter-{run.hash}", "model")
        tracker.summary(facts | {"train/seconds": saving.total_seconds()})
    record.finish(
        STAGE, train_seconds=saving.total_seconds(), threads=threads, steps=run.train.steps, **facts
    )


def frozen(run: Run) -> Diffusion:
    """The run's model, where it is to be trained."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load(placed(run.model), DTYPES[run.model.precision]).to(device)


def seen(run: Run, diffusion: Diffusion, images: Dataset) -> Cache | Stored:
    """The images as the run's model sees them."""
    return material(run, images, diffusion)


def mount(run: Run, diffusion: Diffusion) -> dict[str, Mounted]:
    """The run's adapter on each part that trains, as it starts."""
    parts = diffusion.trained(run.model.text_encoder)
    adapter, mounted = run.adapter_value(), {}
    for part, model in parts.items():
        names = targets.match(model, run.model.preset, part)
        mounted[part] = attach(
            model,
            adapter,
            names,
            seed=run.seed,
            options=run.options,
            overrides=targets.fitting(model, adapter, names),
            init_scale=partial(_init_scale, run, part),
        )
    return mounted


def _init_scale(run: Run, part: str, layer: str, factor: str) -> float:
    return run.train.init_scale * group_of(run.train.groups, f"{part}.{layer}", factor).init_scale


def fit(
    run: Run,
    module: Training,
    cached: Cache | Stored,
    repeats: tuple[int, ...],
    first: int,
    between: list[lightning.Callback],
) -> None:
    """Steps `first` to the last, by Lightning's Trainer."""
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
        rank, ranks = trainer.global_rank, trainer.world_size
        orders = [
            cached.order(size, run.seed, part, count)
            for size, part, count in parts(run.train, rank, ranks)
        ]
        feed = Feed(run.train, module.diffusion.objective, cached, orders, first)
        trainer.fit(module, train_dataloaders=feed)


def metadata(run: Run, images: Dataset) -> dict[str, str]:
    """What the adapter file says of its training; no dates, so equal factors are equal files."""
    settings, plain = run.train, run.to_dict()
    epochs = settings.steps * settings.samples_per_step / images.samples_per_epoch
    return {
        "ss_output_name": run.name,
        "ss_seed": str(run.seed),
        "ss_steps": str(settings.steps),
        "ss_epoch": str(math.ceil(epochs)),
        "ss_gradient_accumulation_steps": str(settings.accumulate),
        "ss_learning_rate": str(settings.lr),
        "ss_optimizer": str(run.optimizer["kind"]),
        "ss_num_train_images": str(images.samples_per_epoch),
        "ss_sd_model_name": Path(run.model.path).name,
        "modelspec.trigger_phrase": f"{images.trigger} {images.class_word}".strip(),
        "lyco_lab.run": json.dumps(
            {"hash": run.hash, "optimizer": plain["optimizer"], "train": plain["train"]}
        ),
    }


@contextmanager
def exact(threads: int | None) -> Iterator[int]:
    """Algorithms that give the same bits each time. Yields the number of threads they use.

    Sums are split among threads, so a run that goes on takes the number it began with. On a GPU
    an operation without an exact algorithm is only warned of: there are some.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        torch.get_num_threads(),
    )
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    memory.fill_uninitialized_memory = False  # a debugging aid that costs time
    if threads is not None and threads != torch.get_num_threads():
        print(f"going on with {threads} threads, as this run began")
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before[2]
        torch.set_num_threads(before[3])


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
