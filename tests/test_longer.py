"""A run with more steps begins where the shorter one ended, and ends as if it had not."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab import longer
from lyco_lab.config import Data, Run, Train, load_study
from lyco_lab.data.stage import prepare
from lyco_lab.engines import local
from lyco_lab.record import Record
from lyco_lab.train import train

SETTINGS = {
    "plain": {},
    "everything": {
        "train": {
            "batch_size": 2, "accumulate": 2, "ema_decay": 0.7, "caption_dropout": 0.3,
            "noise_offset": 0.1, "validate_every": 3, "validation_share": 0.2, "sample_every": 4,
        },
        "model.text_encoder": True,
        "options.dropout": 0.1,
        "generate.steps": 2,
    },
    "averages-itself": {"optimizer": {"kind": "schedulefree"}},
}  # fmt: skip


@pytest.fixture
def study(tmp_path, tiny_sd, tiny_concept):
    """Write and load a study of runs of these numbers of steps."""

    def load(*steps, settings=None, name="mine", **more):
        common = {
            "model": {"path": str(tiny_sd), "preset": "attn-only"},
            "data.folder": str(tiny_concept),
            "train": {"warmup_steps": 2, "checkpoint_every": 4},
            "wandb.mode": "disabled",
        }
        own = {key: dict(value) if isinstance(value, dict) else value
               for key, value in (settings or {}).items()}  # fmt: skip
        common["train"] = common["train"] | own.pop("train", {})
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        text = {"question": "Q?", "expectation": "E.", "set": common | own}
        text |= {"runs": [{"name": "lora", "set": {"adapter.rank": 2}}]}
        text |= {"grid": {"train.steps": list(steps)}} | more
        (folder / "study.yaml").write_text(yaml.safe_dump(text))
        return load_study(folder)

    return load


@pytest.fixture
def trained_only(monkeypatch):
    """Studies stop after training."""
    nothing = {stage: lambda run, record, stage=stage: record.finish(stage)
               for stage in ("generate", "evaluate")}  # fmt: skip
    monkeypatch.setattr(local, "BY_NAME", {"data": prepare, "train": train} | nothing)
    monkeypatch.setattr(local, "conclude", lambda study, root, **how: None)


def leaves(root: Path, run: Run) -> dict[str, bytes]:
    folder = root / run.folder_name
    files = [folder / "adapter.safetensors", folder / "train" / "metrics.csv"]
    files += sorted((folder / "train" / "samples").glob("*"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.slow] * (name != "plain"))
        for name, settings in SETTINGS.items()
    ],
)
def test_it_ends_with_the_bits_of_a_run_of_its_own(study, trained_only, tmp_path, capsys, settings):
    """5, and no step at which a checkpoint, a norm or a sample is due, among the lengths."""
    asked = study(5, 12, 9, settings=settings)
    local.run_study(asked, tmp_path / "once")
    said = capsys.readouterr().out
    assert "lora-steps9: goes on from step 5 of lora-steps5" in said
    assert "lora-steps12: goes on from step 9 of lora-steps9" in said
    local.run_study(asked, tmp_path / "apart", fold=False)
    assert "goes on from" not in capsys.readouterr().out
    for run in asked.runs:
        once, apart = (leaves(tmp_path / where, run) for where in ("once", "apart"))
        assert once == apart
    assert len({leaves(tmp_path / "once", run)["adapter.safetensors"] for run in asked.runs}) == 3


def test_a_run_of_before_is_gone_on_from(study, trained_only, tmp_path, capsys):
    """Of another study too, and whatever it is called."""
    root = tmp_path / "runs"
    local.run_study(study(5), root)
    (after,) = study(8, name="other").runs
    assert longer.starts([after], root)[after.name].steps == 5
    local.run_study(study(8, name="other"), root)
    assert "goes on from step 5 of lora-steps5" in capsys.readouterr().out
    began = (root / after.folder_name / "train" / longer.SAID).read_text()
    assert began.startswith("Steps 1 to 5 were trained in lora-steps5-")
    assert longer.starts([after], root) == {}  # it has begun
    with (root / after.folder_name / "train" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 9))


def test_another_configuration_begins_at_0(study, trained_only, tmp_path):
    root = tmp_path / "runs"
    local.run_study(study(5), root)
    for name, value in {
        "seed": 1, "train.ema_decay": 0.5, "train.schedule": "cosine", "train.lr": 2e-3,
    }.items():  # fmt: skip
        other = study(8, settings={name: value}, name="other")
        assert longer.starts(other.runs, root) == {}, name
    local.run_study(other, root)
    assert not (root / other.runs[0].folder_name / "train" / longer.SAID).exists()


@pytest.mark.parametrize(
    "harm",
    [
        "images",
        pytest.param("weights", marks=pytest.mark.slow),
        "checkpoint",
        pytest.param("no checkpoint", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_gone_on_from_is_left_alone(study, trained_only, tmp_path, harm):
    root = tmp_path / "runs"
    short = study(5)
    local.run_study(short, root)
    folder = root / short.runs[0].folder_name
    (state,) = (file for file in (folder / "train" / "checkpoints").glob("*5.ckpt"))
    if harm == "checkpoint":
        state.write_bytes(state.read_bytes()[:-100])
    elif harm == "no checkpoint":
        state.unlink()
    else:
        record = Record(folder)
        fact = {"images": "digest", "weights": "model"}[harm]
        record.finish("data", **record.facts("data") | {fact: "others"})
    after = study(8, name="other")
    local.run_study(after, root)
    assert not (root / after.runs[0].folder_name / "train" / longer.SAID).exists()


@pytest.mark.slow
def test_runs_of_a_pair_begin_at_0(study, trained_only, tmp_path):
    root = tmp_path / "runs"
    asked = study(5, 8, 9, pairs=[["lora-steps8", "lora-steps9"]])
    local.run_study(asked, root)
    assert not list(root.glob(f"*/train/{longer.SAID}"))


def test_a_kill_before_its_first_step_loses_nothing(study, trained_only, tmp_path, monkeypatch):
    """Whatever of the beginning was there already is there once."""
    asked, root = study(5, 8), tmp_path / "runs"
    local.run_study(study(5), root)
    long = asked.run("lora-steps8")

    def killed(*_):
        raise KeyboardInterrupt

    for what in ("journal.write", "Checkpoints.save"):
        record = Record.open(root, long)
        if not record.done("data"):
            prepare(long, record)
        with monkeypatch.context() as patch:
            patch.setattr(f"lyco_lab.longer.{what}", killed)
            with pytest.raises(KeyboardInterrupt):
                longer.begin(long, record)
    local.run_study(asked, root)
    local.run_study(asked, tmp_path / "apart", fold=False)
    assert leaves(root, long) == leaves(tmp_path / "apart", long)


@given(
    st.lists(
        st.tuples(st.integers(30, 35), st.sampled_from([0, 1]), st.sampled_from(["a", "b"])),
        unique=True,
        max_size=12,
    ),
    st.sampled_from(["constant", "cosine"]),
)
def test_lines_are_the_runs_that_differ_in_their_steps_alone(asked, schedule):
    runs = [
        Run(name=f"r{steps}-{seed}-{word}", study="s", seed=seed, data=Data(folder=word),
            train=Train(steps=steps, schedule=schedule))
        for steps, seed, word in asked
    ]  # fmt: skip
    fresh = {run.name for run in runs if run.seed and run.train.steps == 31}
    found = longer.lines(runs, fresh)
    assert sorted(run.name for line in found for run in line) == sorted(run.name for run in runs)
    alone = [run for run in runs if run.name in fresh or schedule != "constant"]
    assert all([run] in found for run in alone)
    for line in found:
        steps = [run.train.steps for run in line]
        assert steps == sorted(set(steps))
        assert len({replace(run, name="x", train=Train(steps=30)).hash for run in line}) == 1
    if schedule == "constant":
        together = {(run.seed, run.data.folder) for run in runs if run not in alone}
        assert len(found) == len(together) + len(alone)
