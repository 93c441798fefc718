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
from lyco_lab.files import locked, owner
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


FOUR = """
question: Does one that fails stop the others?
expectation: No.
base: {base}
set:
  train: {{steps: 6, checkpoint_every: 2, lr: 1e-2, warmup_steps: 2}}
  generate: {{types: [trigger], images_per_type: 1, steps: 2, batch_size: 1}}
  wandb: {{mode: disabled}}
  data: {{concept: falls}}
  adapter: {{kind: lora, rank: 2}}
runs:
  - {{name: well, set: {{seed: 1}}}}
  - name: hot
    set: {{train: {{lr: 1e30, grad_clip: null}}, optimizer: {{kind: sgd}}}}
  - {{name: killed, set: {{seed: 2, train.steps: 4000}}}}
  - {{name: last, set: {{seed: 3}}}}
"""


def worker_of(root, name, command):
    """The process that is training a run, as part of a command."""
    metrics = f"{name}-????????/train/metrics.csv"
    while not any(file.read_text().count("\n") > 1 for file in root.glob(metrics)):
        assert command.poll() is None, command.communicate()
        time.sleep(0.05)
    (folder,) = root.glob(f"{name}-????????")
    return int(owner(folder).split()[1])


@pytest.mark.slow
def test_of_four_runs_one_diverges_one_is_killed_and_the_others_are_done(pytestconfig, tmp_path):
    folder, root = tmp_path / "four", tmp_path / "runs"
    folder.mkdir()
    base = pytestconfig.rootpath / "experiments" / "base.yaml"
    (folder / "study.yaml").write_text(FOUR.format(base=base))
    process = subprocess.Popen(
        command(folder, root, 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.kill(worker_of(root, "killed", process), signal.SIGKILL)
    stdout, stderr = process.communicate()
    assert process.returncode == 1, stderr
    assert "killed failed in train: its process was killed by signal 9 (SIGKILL), most" in stderr
    assert "hot failed in train: the loss is" in stderr or "hot failed in train: " in stderr
    assert "error: 2 runs failed" in stderr and "Traceback" not in stderr
    assert len(adapters(root)) == 2
    page = (root / "four" / "report.html").read_text()
    assert "2 of 4 runs" in page and "<b>hot</b>" in page and "<b>killed</b>" in page
    # Once more: nothing is tried. On request: what was killed is mended from its checkpoint.
    again = subprocess.run(command(folder, root, 1), capture_output=True, text=True)
    assert again.returncode == 1 and "not tried again without --retry-failed" in again.stdout
    words = [*command(folder, root, 1), "--retry-failed", "--only", "killed"]
    file = next(root.glob("killed-*")) / "train" / "metrics.csv"
    rows = file.read_text().count("\n")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while file.read_text().count("\n") <= rows + 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143 and "which is saved" in stderr
    assert not (file.parents[1] / "failed").exists()


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
