"""A run that was killed, stopped or damaged, and run again, ends as if nothing had happened."""

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import time
import traceback

import pytest
import torch

from lyco_lab.adapters.options import Options
from lyco_lab.config import Data, Embedding
from lyco_lab.data.stage import prepare
from lyco_lab.errors import Interrupted, UserError
from lyco_lab.record import Record
from lyco_lab.train import train
from lyco_lab.train.checkpoint import Checkpoints, read
from tests.data import pictures
from tests.train.stepping import at_step


def checkpoints(record):
    return Checkpoints(record.path / "train" / "checkpoints")


def rows_written(record):
    path = record.path / "train" / "metrics.csv"
    return path.read_bytes().count(b"\n") - 1 if path.is_file() else 0


def in_a_process(run, record):
    """Train in a forked process; its number."""
    number = os.fork()
    if number == 0:
        try:
            train(run, record)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return number


def kill_when(number, record, rows, more_s):
    """SIGKILL a process `more_s` after it wrote so many rows; whether it was still running."""
    give_up_s = time.monotonic() + 60
    while rows_written(record) < rows:
        assert time.monotonic() < give_up_s
        if os.waitpid(number, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(more_s)
    os.kill(number, signal.SIGKILL)
    _, status = os.waitpid(number, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.7, "text_encoder": True},
        pytest.param(
            {"optimizer": {"kind": "sgd", "momentum": 0.9}, "lr": 0.1}, marks=pytest.mark.slow
        ),
        pytest.param({"train_norm": True, "ema_decay": 0.7}, marks=pytest.mark.slow),
    ],
    ids=["average-and-text-encoder", "momentum", "norms"],
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(begin, trained, results, settings):
    settings = {"steps": 24, "checkpoint_every": 5, **settings}
    _, straight = trained("straight", **settings)
    run, killed = begin("killed", **settings)
    rng = random.Random()
    for rows in sorted(rng.sample(range(1, 24), 3)):
        kill_when(in_a_process(run, killed), killed, rows, rng.uniform(0, 0.03))
    assert os.waitpid(in_a_process(run, killed), 0)[1] == 0
    assert results(killed) == results(straight)
    ours, theirs = (read(checkpoints(r).files()[0]) for r in (killed, straight))
    for part, factors in theirs.factors.items():
        for name, factor in factors.items():
            assert torch.equal(ours.factors[part][name], factor)


PROGRAM = """
import sys
from pathlib import Path
import torch
from lyco_lab.config import Data, Model, Run, Train, Wandb
from lyco_lab.data.stage import prepare
from lyco_lab.record import Record
from lyco_lab.train import train
torch.set_num_threads(1)
root, model, images = sys.argv[1:]
run = Run(
    name="killed", study="tests", model=Model(path=model), data=Data(folder=images),
    train=Train(steps=40, warmup_steps=5, checkpoint_every=10), wandb=Wandb(mode="offline"),
)
record = Record.open(Path(root), run)
prepare(run, record)
train(run, record)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_python_of_its_own_killed_and_started_again(
    tiny_sd, tiny_concept, tmp_path, results, number
):
    """As a user's would be: nothing is shared with this process, and W&B is running."""

    def start(where):
        words = [sys.executable, "-c", PROGRAM, tmp_path / where, tiny_sd, tiny_concept]
        return subprocess.Popen(
            list(map(str, words)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def records(where):
        """The run's folder, once it is there; what runs share lies beside it."""
        return [Record(folder) for folder in (tmp_path / where).glob("killed-*")]

    def finish(where):
        process = start(where)
        _, said = process.communicate()
        assert process.returncode == 0, said

    def stop(number, rows):
        """Send a signal to the group, as a terminal does, once so many rows are written."""
        with start("stopped") as process:
            try:
                while sum(map(rows_written, records("stopped"))) < rows:
                    assert process.poll() is None
                    time.sleep(0.002)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            os.killpg(process.pid, number)
            return process.communicate()[1]

    finish("straight")
    rng = random.Random()
    stop(signal.SIGKILL, rng.randint(1, 20))
    assert "which is saved" in stop(number, rng.randint(21, 38))
    finish("stopped")
    stopped, straight = (results(*records(where)) for where in ("stopped", "straight"))
    assert stopped == straight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [6, 12])
def test_stopped_by_a_signal_it_saves_and_goes_on(
    begin, trained, results, monkeypatch, number, step
):
    """Also in the last step: nothing else may begin after it."""
    _, straight = trained("straight")
    run, record = begin("stopped")
    before = signal.getsignal(number)
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=f"after step {step} of 12, which is saved") as raised:
        train(run, record)
    assert raised.value.number == number
    assert signal.getsignal(number) is before
    assert checkpoints(record).files()[0].name == f"step{step:08d}.ckpt"
    assert not record.done("train")
    monkeypatch.undo()
    train(run, record)
    assert results(record) == results(straight)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(begin, monkeypatch, second):
    run, record = begin()

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), second)

    at_step(monkeypatch, 6, twice)
    with pytest.raises(Interrupted, match="stopped at once; the last checkpoint is kept") as raised:
        train(run, record)
    assert raised.value.number == second
    assert checkpoints(record).files()[0].name == "step00000004.ckpt"


def test_a_signal_that_was_ignored_stays_ignored(begin, monkeypatch):
    """A shell starts jobs in the background so."""
    run, record = begin()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
        train(run, record)
    finally:
        signal.signal(signal.SIGINT, before)
    assert record.done("train")


def stop_at(begin, monkeypatch, where, step, **settings):
    run, record = begin(where, **settings)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train(run, record)
    return run, record


@pytest.mark.parametrize("damage", ["cut", "flipped", "row"])
def test_a_damaged_checkpoint_or_row_costs_steps_and_nothing_else(
    begin, trained, results, monkeypatch, capsys, damage
):
    _, straight = trained("straight")
    run, record = stop_at(begin, monkeypatch, "damaged", 10)
    newest = checkpoints(record).files()[0]
    content = bytearray(newest.read_bytes())
    if damage == "row":  # a number that looks right
        newest = record.path / "train" / "metrics.csv"
        content = bytearray(newest.read_bytes())
        place = content.index(b".", content.index(b"\n9,")) + 1
        content[place] ^= 1  # 0 and 1, 2 and 3, …
    elif damage == "flipped":
        middle = slice(len(content) // 2, len(content) // 2 + 200)  # more than the padding between
        content[middle] = bytes(byte ^ 0xFF for byte in content[middle])  # two tensors
    newest.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    train(run, record)
    said = capsys.readouterr().out
    why = "was saved beside other rows" if damage == "row" else "is damaged"
    assert f"step00000010.ckpt {why}" in said and "going on from the one before it" in said
    assert results(record) == results(straight)


def test_all_checkpoints_damaged_is_a_new_beginning(begin, trained, results, monkeypatch):
    _, straight = trained("straight")
    run, record = stop_at(begin, monkeypatch, "damaged", 10)
    for file in checkpoints(record).files():
        file.write_bytes(b"")
    train(run, record)
    assert results(record) == results(straight)


def test_killed_after_the_last_step_only_the_export_is_left(begin, trained, results, monkeypatch):
    _, straight = trained("straight")
    run, record = begin("killed")

    def killed(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("lyco_lab.train.stage.kohya.save", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(run, record)
    monkeypatch.setattr("lyco_lab.train.stage.fit", killed)
    train(run, record)
    assert results(record) == results(straight)


def test_a_full_disk_stops_the_run_until_there_is_room(begin, trained, results, monkeypatch):
    _, straight = trained("straight")
    run, record = begin("full")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lyco_lab.train.checkpoint.torch.save", full)
        with pytest.raises(UserError, match="no space left to write in .*checkpoints"):
            train(run, record)
    train(run, record)
    assert results(record) == results(straight)


def test_going_on_uses_the_number_of_threads_it_began_with(begin, monkeypatch, capsys):
    run, record = stop_at(begin, monkeypatch, "runs", 6)
    torch.set_num_threads(2)
    train(run, record)
    assert "going on with 1 threads, as this run began" in capsys.readouterr().out
    assert torch.get_num_threads() == 2
    assert record.facts("train")["threads"] == 1


def test_seconds_add_up_over_sittings(begin, monkeypatch):
    run, record = stop_at(begin, monkeypatch, "runs", 6)
    spent = read(checkpoints(record).files()[0]).seconds
    assert spent > 0
    train(run, record)
    assert record.facts("train")["train_seconds"] > spent


@pytest.mark.slow
def test_killed_twenty_times_with_everything_on(begin, tmp_path, results):
    """Several batches and sizes, all that is drawn, averages, texts, prior images, a word."""
    sizes = [(64, 64), (96, 40), (40, 96), (64, 64), (96, 40), (64, 64), (40, 96)]
    data = Data(
        folder=str(pictures.folder(tmp_path / "pictures", sizes)),
        prior=str(pictures.folder(tmp_path / "prior", sizes[:4])),
        resolution=64,
        buckets=(32, 96, 32),
        flip=True,
        shuffle_tags=True,
        keep_tags=1,
        tag_dropout=0.2,
    )
    settings = {
        "steps": 40, "checkpoint_every": 3, "batch_size": 2, "accumulate": 2, "ema_decay": 0.8,
        "caption_dropout": 0.3, "text_encoder": True, "noise_offset": 0.1,
        "input_perturbation": 0.1, "min_snr_gamma": 5.0, "loss": "huber",
        "schedule": "cosine_restarts", "schedule_restarts": 2,
        "gradient_checkpointing": True, "validate_every": 4, "validation_share": 0.2,
        "stop_on_divergence": 50.0, "sample_every": 20,
    }  # fmt: skip

    def everything(where):
        run, _ = begin(where, **settings)
        run = dataclasses.replace(
            run,
            data=data,
            embedding=Embedding(token="sks", init="c"),
            options=Options(dropout=0.1, rank_dropout=0.1, module_dropout=0.1),
        )
        record = Record.open(tmp_path / where, run)
        prepare(run, record)
        return run, record

    run, straight = everything("straight")
    train(run, straight)
    run, killed = everything("killed")
    rng, kills = random.Random(), 0
    for rows in sorted(rng.sample(range(1, 40), 20)):
        kills += kill_when(in_a_process(run, killed), killed, rows, rng.uniform(0, 0.05))
    assert kills >= 15
    assert os.waitpid(in_a_process(run, killed), 0)[1] == 0
    assert results(killed) == results(straight)
    words = [(r.path / "embeddings" / "sks.safetensors").read_bytes() for r in (straight, killed)]
    assert words[0] == words[1]
