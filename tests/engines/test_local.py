"""Runs side by side, killed and begun again: the same bytes as one after another."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from lyco_lab.config import load_study
from lyco_lab.engines import local
from lyco_lab.errors import UserError
from lyco_lab.files import locked
from lyco_lab.record import Record

STUDY = """
question: Is it the same?
expectation: It is.
base: {base}
set:
  train: {{steps: 12, checkpoint_every: 4, lr: 1e-2, warmup_steps: 2}}
  generate: {{types: [trigger], images_per_type: 2, steps: 2, batch_size: 2}}
  wandb: {{mode: {wandb}}}
runs:
  - name: lora
    set: {{data.concept: falls, adapter: {{kind: lora, rank: 2, alpha: 4.0}}}}
  - name: lokr
    set: {{data.concept: falls, adapter: {{kind: lokr}}}}
  - name: lora-again
    set:
      data.concept: falls
      adapter: {{kind: lora, rank: 2, alpha: 1.0}}
      optimizer: {{eps: 5e-9, weight_decay: 0.005}}
      train: {{lr: 2e-2, init_scale: 2, grad_clip: 0.5}}
  - name: native
    set: {{data.concept: robo, adapter: {{kind: native}}}}
"""


@pytest.fixture
def study(tmp_path, pytestconfig):
    folder = tmp_path / "twice"
    folder.mkdir()
    base = pytestconfig.rootpath / "experiments" / "base.yaml"
    (folder / "study.yaml").write_text(STUDY.format(base=base, wandb="disabled"))
    return folder


def adapters(root):
    return {p.parent.name: p.read_bytes() for p in sorted(root.glob("*/adapter.safetensors"))}


def command(study, root, workers):
    return [
        sys.executable, "-m", "lyco_lab", "run", str(study), "--out", str(root),
        "--workers", str(workers),
    ]  # fmt: skip


@pytest.mark.slow
def test_side_by_side_and_killed_at_random_moments_ends_with_the_same_bytes(study, tmp_path):
    one_by_one = tmp_path / "one-by-one"
    began = time.monotonic()
    subprocess.run(command(study, one_by_one, 1), check=True)
    lasts = time.monotonic() - began
    expected = adapters(one_by_one)
    again, lora = (next(one_by_one.glob(f"{name}-????????")) for name in ("lora-again", "lora"))
    assert expected[again.name] == expected[lora.name]  # trained once
    assert len(expected) == 4
    rng = random.Random(0)
    killed = tmp_path / "killed"
    for _ in range(5):
        process = subprocess.Popen(command(study, killed, 2), stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 0.9) * lasts)
        process.send_signal(signal.SIGKILL)  # its workers have to notice by themselves
        process.wait()
    last = subprocess.run(command(study, killed, 2), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert adapters(killed) == expected
    assert (killed / "twice" / "report.html").is_file()
    assert not list(killed.rglob(".part-*"))


def test_a_folder_in_work_is_waited_for(tmp_path):
    order = []

    def work():
        with locked(tmp_path / "run"):
            order.append("second")

    with locked(tmp_path / "run"):
        second = threading.Thread(target=work)
        second.start()
        time.sleep(0.2)
        order.append("first")
    second.join()
    assert order == ["first", "second"]


def test_a_run_trained_on_other_weights_is_refused(study, tmp_path):
    loaded = load_study(study)
    record = Record.open(tmp_path / "runs", loaded.runs[0])
    record.finish("data", model="0badcafe")
    with pytest.raises(UserError, match="other weights of 'miniature'.*0badcafe.*--out"):
        local.run_study(loaded, tmp_path / "runs")


@pytest.mark.parametrize("cores", [1, 3, 64])
def test_workers_suggested(study, monkeypatch, cores):
    """As many as this process may use cores, however many the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    loaded = load_study(study)
    assert local.suggested_workers(loaded) == min(cores, 4)
    elsewhere = load_study(study, ["model.path=/models/sd15"])
    assert local.suggested_workers(elsewhere) == 1
