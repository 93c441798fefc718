"""A run of the tiny model on the tiny concept, ready to train."""

from pathlib import Path
from typing import Any

import pytest

from lyco_lab.config import Data, Generate, Model, Run, Train, Trainer, Wandb
from lyco_lab.config.training import Plugin
from lyco_lab.data.stage import prepare
from lyco_lab.errors import Interrupted
from lyco_lab.record import Record
from lyco_lab.train import train
from tests.train.stepping import at_step


@pytest.fixture
def begin(tiny_sd, tiny_concept, tmp_path):
    """begin("a", steps=5) -> a run and its folder below tmp_path/a, data stage done."""

    def begin(
        where: str = "runs",
        *,
        adapter: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        text_encoder: bool = False,
        max_token_length: int | None = None,
        train_norm: bool = False,
        precision: str = "fp32",
        seed: int = 0,
        wandb: str = "disabled",
        devices: int = 1,
        callbacks: tuple[Plugin, ...] = (),
        loggers: tuple[Plugin, ...] = (),
        **train: Any,
    ) -> tuple[Run, Record]:
        settings = {"steps": 12, "warmup_steps": 2, "checkpoint_every": 4} | train
        run = Run(
            name="lora",
            study="tests",
            seed=seed,
            model=Model(
                path=str(tiny_sd),
                text_encoder=text_encoder,
                max_token_length=max_token_length,
                train_norm=train_norm,
                precision=precision,
            ),
            data=Data(folder=str(tiny_concept)),
            adapter=adapter or {"kind": "lora", "rank": 4, "alpha": 2.0},
            optimizer=optimizer or {"kind": "adamw"},
            train=Train(**settings),
            trainer=Trainer(
                accelerator="cpu", devices=devices, callbacks=callbacks, loggers=loggers
            ),
            generate=Generate(steps=2),
            wandb=Wandb(mode=wandb),
        )
        record = Record.open(tmp_path / where, run)
        prepare(run, record)
        return run, record

    return begin


@pytest.fixture
def trained(begin):
    """The same, and trained to the end."""

    def trained(where: str = "runs", **settings: Any) -> tuple[Run, Record]:
        run, record = begin(where, **settings)
        train(run, record)
        return run, record

    return trained


@pytest.fixture
def results():
    """What has to be equal when two runs are the same run: adapter file and metrics."""

    def results(record: Record) -> tuple[bytes, bytes]:
        folder: Path = record.path
        return (
            (folder / "adapter.safetensors").read_bytes(),
            (folder / "train" / "metrics.csv").read_bytes(),
        )

    return results


@pytest.fixture
def interrupted(monkeypatch):
    """Train a run, and stop it from outside after so many steps."""

    def interrupted(run: Run, record: Record, after: int) -> None:
        def stop() -> None:
            raise Interrupted("here")

        with monkeypatch.context() as patch:
            at_step(patch, after, stop)
            with pytest.raises(Interrupted):
                train(run, record)

    return interrupted
