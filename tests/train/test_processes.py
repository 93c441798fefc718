"""Several processes are one with the whole batch, end together, and never leave one waiting."""

import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from lyco_lab.errors import Interrupted, UserError
from lyco_lab.train import train
from lyco_lab.train.module import Training
from tests.train.stepping import at_step
from tests.train.test_stage import factors, rows

SETTINGS = {"steps": 8, "checkpoint_every": 4, "lr": 1e-2, "noise_offset": 0.1}
OTHERS = {
    "accumulate": 2, "ema_decay": 0.8, "text_encoder": True, "gradient_checkpointing": True,
    "max_token_length": 60,
}  # fmt: skip


def stop_at(monkeypatch, step):
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGINT))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, OTHERS], ids=["plain", "with-all"])
def test_two_processes_are_one_with_twice_the_batch(trained, capfd, more):
    """Up to rounding, which sums in another order bring; another batch is far away."""
    settings = SETTINGS | more
    _, one = trained("one", batch_size=4, **settings)
    _, two = trained("two", batch_size=4, devices=2, **settings)
    _, half = trained("half", batch_size=2, **settings)
    said = "".join(capfd.readouterr())
    assert "Error" not in said and "arning" not in said and "distributed" not in said
    assert one.path.name == two.path.name
    assert (two.facts("train")["devices"], len(multiprocessing.active_children())) == (2, 0)
    assert not torch.distributed.is_initialized() and "MASTER_ADDR" not in os.environ
    for key in ("loss", "grad_norm", "lr", "delta_norm"):
        found, expected, far = (
            [float(row[key]) for row in rows(record) if row[key]] for record in (two, one, half)
        )
        assert found == pytest.approx(expected, rel=1e-3)
        if key == "loss":
            assert far != pytest.approx(expected, rel=1e-2)
    # Adam makes steps of about lr of the smallest gradients, whose sign may be a rounding's.
    ours, theirs = factors(two), factors(one)
    square = sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in theirs)
    moved = sum(float((theirs[name] ** 2).sum()) for name in theirs)
    assert square < 1e-6 * moved


@pytest.mark.slow
def test_two_processes_that_were_stopped_go_on_bit_for_bit(begin, trained, results, monkeypatch):
    settings = SETTINGS | {"devices": 2, "ema_decay": 0.8}
    _, straight = trained("straight", **settings)
    run, record = begin("stopped", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Interrupted, match="stopped after step 5 of 8, which is saved"):
            train(run, record)
    assert not multiprocessing.active_children()
    train(run, record)
    assert results(record) == results(straight)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(begin, trained, monkeypatch, before, after):
    """In its own folder, from the state it had; and as a whole it is the run of one process."""
    _, straight = trained("straight", **SETTINGS)
    run, record = begin("changed", devices=before, **SETTINGS)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Interrupted):
            train(run, record)
    kept = shutil.copytree(record.path, record.path.parents[1] / "kept" / record.path.name)
    run, same = begin("changed", devices=after, **SETTINGS)
    assert same.path == record.path
    train(run, same)
    assert rows(same)[:5] == rows_of(kept)
    for key in ("loss", "grad_norm"):
        found, expected = ([float(row[key]) for row in rows(r)] for r in (same, straight))
        assert found == pytest.approx(expected, rel=1e-3)


def rows_of(folder):
    import csv

    with (folder / "train" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_its_name(begin, monkeypatch):
    run, record = begin(devices=2, **SETTINGS)

    def kill():
        (other,) = multiprocessing.active_children()
        os.kill(other.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        at_step(patch, 6, kill)
        with pytest.raises(UserError, match="process 2 of those that train together .* code -9"):
            train(run, record)
    train(run, record)
    assert record.done("train")


@pytest.mark.slow
def test_what_a_process_cannot_load_is_said_before_a_step(begin, monkeypatch):
    run, record = begin(devices=2, **SETTINGS)
    tokenizer = record.path.parents[1] / "model" / "tokenizer"
    model = shutil.copytree(run.model.path, tokenizer.parent)
    object.__setattr__(run.model, "path", str(model))
    made = Training.__init__

    def spoil(self, *arguments):
        made(self, *arguments)
        shutil.rmtree(model / "unet")

    monkeypatch.setattr(Training, "__init__", spoil)
    with pytest.raises(UserError, match=re.escape(str(model.name)) + ".*unet"):
        train(run, record)
    assert rows(record) == []


@pytest.mark.slow
def test_factors_that_drift_apart_are_noticed(begin, monkeypatch):
    run, record = begin(devices=2, **SETTINGS)
    step = Training.optimizer_step

    def wrong(self, *arguments, **others):  # in this process only
        step(self, *arguments, **others)
        next(iter(self.factors().values())).data.view(-1)[0] *= 1.0000001

    monkeypatch.setattr(Training, "optimizer_step", wrong)
    with pytest.raises(UserError, match="ended with factors that differ"):
        train(run, record)
    assert not record.done("train")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all(begin, monkeypatch, capfd):
    run, record = begin(devices=2, **(SETTINGS | {"lr": 1e30, "grad_clip": None}),
                        optimizer={"kind": "sgd"})  # fmt: skip
    began = time.monotonic()
    with pytest.raises(UserError, match=r"at step \d+: .* try a smaller train.lr than 1e\+30"):
        train(run, record)
    assert time.monotonic() - began < 60 and not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err
    assert threading.active_count() < 20


def test_factors_without_effect_are_known_before(begin):
    from lyco_lab.data import cache
    from lyco_lab.data.folder import read
    from lyco_lab.diffusion.model import load
    from lyco_lab.train.feed import Feed
    from lyco_lab.train.stage import mount

    run, _ = begin(text_encoder=True)
    diffusion = load(run.model.path)
    module = Training(diffusion, mount(run, diffusion), run.train, run.optimizer_value())
    shown = cache.build(diffusion, read(Path(run.data.folder)), text_states=False)
    (order,) = [shown.order(2, 0)]
    batch = next(iter(Feed(run.train, diffusion.objective, shown, [order], 0)))
    assert not module.has_idle_factors(batch)
    states = diffusion.encode_text(["a", "b"])
    assert module.has_idle_factors(batch._replace(text=states))
    assert all(factor.grad is None for factor in module.trained)


def test_more_devices_than_there_are_is_an_error(begin):
    run, record = begin()
    object.__setattr__(run.trainer, "accelerator", "gpu")
    object.__setattr__(run.trainer, "devices", 99)
    with pytest.raises(UserError, match=r"trainer.devices is 99 .* but there (is|are) \d+ GPU"):
        train(run, record)
