"""Every stage computes where `trainer.accelerator` says."""

from dataclasses import replace

import pytest
import torch

import lyco_lab.evaluate.stage as evaluate_stage
import lyco_lab.generate as generate_module
import lyco_lab.train.stage as train_stage
from lyco_lab.config import Data, Run, Trainer
from lyco_lab.devices import device
from lyco_lab.errors import UserError
from lyco_lab.miniature import judges
from lyco_lab.record import Record

RUN = Run(name="a", study="tests", data=Data(concept="kael"))


def asking(accelerator, devices=1):
    trainer = Trainer(accelerator=accelerator, devices=devices)
    return replace(RUN, trainer=trainer)


@pytest.fixture
def gpus(monkeypatch):
    def gpus(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return gpus


@pytest.mark.parametrize(
    ("accelerator", "here", "expected"),
    [("auto", 0, "cpu"), ("auto", 1, "cuda:0"), ("cpu", 1, "cpu"), ("gpu", 2, "cuda:0")],
)
def test_the_device_is_the_one_asked_for(gpus, accelerator, here, expected):
    gpus(here)
    assert device(asking(accelerator)) == torch.device(expected)


def test_a_gpu_that_is_not_there_is_an_error(gpus):
    gpus(0)
    with pytest.raises(UserError, match="accelerator is 'gpu', but there are 0 GPUs here; .*=cpu"):
        device(asking("gpu"))
    gpus(1)
    two = asking("gpu", devices=2)
    with pytest.raises(UserError, match="trainer.devices is 2 .* there is 1 GPU here"):
        device(two, needed=2)
    assert device(two) == torch.device("cuda:0")  # a stage that needs one of them
    assert device(asking("auto", devices=2), rank=1, needed=1) == torch.device("cuda:1")


class Placed(Exception):
    """Where something was put; no stage goes on from there."""


@pytest.mark.parametrize("stage", ["train", "generate", "evaluate"])
@pytest.mark.parametrize(("accelerator", "expected"), [("cpu", "cpu"), ("gpu", "cuda:0")])
def test_each_stage_goes_by_the_accelerator(
    gpus, monkeypatch, tmp_path, stage, accelerator, expected
):
    """On a machine with a GPU, where nothing can be computed."""
    gpus(1)
    run = asking(accelerator)

    class Model:
        def to(self, device):
            raise Placed(str(device))

    def loaded(*args, device=None, **kwargs):
        if stage == "evaluate":
            raise Placed(str(device))
        return Model()

    record = Record.open(tmp_path, run)
    for module in (generate_module, evaluate_stage):
        monkeypatch.setattr(module, "base_folder", lambda *_: tmp_path / "base" / "kael-0")
    if stage == "train":
        monkeypatch.setattr(train_stage, "load", loaded)
        work = lambda: train_stage.frozen(run)  # noqa: E731
    elif stage == "generate":
        monkeypatch.setattr(generate_module, "load", loaded)
        monkeypatch.setattr(generate_module, "dataset", lambda *_: type("D", (), {"concepts": ()}))
        work = lambda: generate_module.generate(run, record)  # noqa: E731
    else:
        monkeypatch.setattr(evaluate_stage.miniature_judges, "load", loaded)
        work = lambda: evaluate_stage.evaluate(run, record)  # noqa: E731
    with pytest.raises(Placed) as placed:
        work()
    assert str(placed.value) == expected


def test_judges_are_where_they_were_loaded_to():
    """`meta` computes nothing, and so refuses inputs that were left on the processor."""
    found = judges.load(device="meta")
    modules = (found.clip, found.embedder, found.gram, found.oracle)
    assert {p.device.type for module in modules for p in module.parameters()} == {"meta"}
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8).numpy()
    assert found.image_features(images).device.type == "meta"
    assert found.clip_text(["a figure"]).device.type == "meta"
