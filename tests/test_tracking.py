"""What W&B is told, read back from what it wrote offline."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from lyco_lab import tracking
from lyco_lab.config import Data, Model, Run, Wandb
from lyco_lab.errors import UserError
from lyco_lab.record import Record
from tests.wandb_offline import offline_runs


def a_run(folder, **changes):
    run = Run(
        name="lora-circle",
        study="shapes",
        model=Model(path=str(folder / "models" / "sd")),
        data=Data(folder=str(folder / "circle")),
        wandb=Wandb(mode="offline"),
    )
    return replace(run, **changes)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run that two stages told something, and what W&B wrote of each."""
    folder = tmp_path_factory.mktemp("tracking")
    run = a_run(folder)
    record = Record.open(folder / "runs", run)
    with tracking.track(run, record, "train", {"dataset": "abc", "threads": 1}) as tracker:
        for step in (1, 2, 3, 2):  # the last as after a resume
            tracker.log(step, {"train/loss": step / 10, "lr/unet": 1e-3, "delta_norm": 2.0})
        tracker.image("samples", np.zeros((8, 8, 3), np.uint8), "step 3", step=3)
        adapter = record.path / "adapter.safetensors"
        adapter.write_bytes(b"weights")
        tracker.file(adapter, "adapter-x", "model")
    with tracking.track(run, record, "eval") as tracker:
        tracker.summary({"eval/vendi": 2.5})
        tracker.table("eval/images", ["prompt", "score"], [["a cat", 0.5]])
    return run, record, offline_runs(record.path)


def test_each_stage_adds_to_the_same_run(logged):
    run, _, (train, evaluate) = logged
    for offline, job_type in ((train, "train"), (evaluate, "eval")):
        assert offline.run.run_id == run.hash
        assert offline.run.project == "shapes"
        assert offline.run.display_name == "lora-circle"
        assert offline.run.job_type == job_type
        assert offline.run.run_group == tracking.group(run)
        assert set(offline.run.tags) == {"lora", "attn-mlp", "circle"}


def test_the_configuration_is_complete_and_plain(logged):
    run, _, (train, _) = logged
    for key, value in run.to_dict().items():
        if key not in ("model", "data"):
            assert train.config[key] == value
    assert train.config["config_hash"] == run.hash
    assert train.config["dataset"] == "abc" and train.config["threads"] == 1
    assert {"python", "torch", "lightning"} <= train.config["versions"].keys()
    assert train.config["git"] == {} or len(train.config["git"]["commit"]) == 40


def test_every_logged_step_is_kept_with_its_own_axis(logged):
    _, _, (train, _) = logged
    rows = [row for row in train.history if "train/loss" in row]
    assert [(row[tracking.STEP], row["train/loss"]) for row in rows] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (2, 0.2),
    ]
    assert rows[0]["lr/unet"] == 1e-3 and rows[0]["delta_norm"] == 2.0
    assert any(m.glob_name == "*" and m.step_metric == tracking.STEP for m in train.metrics)


def test_images_files_tables_and_summaries_are_there(logged):
    _, record, (train, evaluate) = logged
    (image,) = [row["samples"] for row in train.history if "samples" in row]
    assert image["caption"] == "step 3"
    assert len(list(record.path.rglob(image["path"]))) == 1
    (artifact,) = train.artifacts
    assert (artifact.name, artifact.type, list(artifact.aliases)) == (
        "adapter-x",
        "model",
        ["latest"],
    )
    assert [entry.path for entry in artifact.manifest.contents] == ["adapter.safetensors"]
    assert artifact.manifest.contents[0].size == len(b"weights")
    assert evaluate.summary["eval/vendi"] == 2.5
    assert any("eval/images" in row for row in evaluate.history)


def test_no_absolute_path_is_shown(logged):
    _, record, runs = logged
    assert runs[0].config["model"]["path"] == "sd"
    assert runs[0].config["data"]["folder"] == "circle"
    for offline in runs:
        for shown in (offline.run, offline.config, offline.history, offline.summary):
            assert str(record.path.parent.parent) not in str(shown)
            assert os.path.expanduser("~") + "/" not in str(shown)


def test_everything_w_and_b_writes_lies_in_the_run_s_folder(logged):
    _, record, _ = logged
    written = {path.parent.parent for path in record.path.rglob("run-*.wandb")}
    assert written == {record.path / "wandb"}


def test_a_group_holds_all_seeds_and_nothing_else(tmp_path):
    run = a_run(tmp_path)
    assert tracking.group(run) == tracking.group(replace(run, seed=7))
    assert tracking.group(run) == tracking.group(replace(run, name="other"))
    assert tracking.group(run) != tracking.group(replace(run, model=Model(preset="full")))


def test_a_project_of_one_s_own(tmp_path):
    run = a_run(tmp_path, wandb=Wandb(project="mine"))
    record = Record.open(tmp_path / "runs", run)
    with tracking.track(run, record, "train"):
        pass
    assert offline_runs(record.path)[0].run.project == "mine"


def test_an_error_closes_the_run_and_passes_through(tmp_path):
    import wandb

    run = a_run(tmp_path)
    record = Record.open(tmp_path / "runs", run)
    with (
        pytest.raises(RuntimeError, match="broken"),
        tracking.track(run, record, "train") as tracker,
    ):
        tracker.log(1, {"train/loss": 1.0})
        raise RuntimeError("broken")
    assert wandb.run is None
    assert offline_runs(record.path)[0].history[0]["train/loss"] == 1.0


def test_disabled_writes_nothing_and_does_not_import_wandb(tmp_path):
    program = f"""
import sys
from pathlib import Path
from lyco_lab import tracking
from lyco_lab.config import Data, Run, Wandb
from lyco_lab.record import Record
run = Run(name="r", study="s", data=Data(concept="octo"), wandb=Wandb(mode="disabled"))
record = Record.open(Path({str(tmp_path)!r}), run)
with tracking.track(run, record, "train") as tracker:
    tracker.log(1, {{"train/loss": 1.0}})
    tracker.summary({{"eval/x": 1.0}})
assert "wandb" not in sys.modules
assert [path.name for path in record.path.iterdir()] == ["config.yaml"]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_online_without_a_login_says_what_to_do(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("no API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    run = a_run(tmp_path, wandb=Wandb(mode="online"))
    record = Record.open(tmp_path / "runs", run)
    with (
        pytest.raises(UserError, match="wandb.mode=online: no API key.* or use --wandb offline"),
        tracking.track(run, record, "train"),
    ):
        pass
