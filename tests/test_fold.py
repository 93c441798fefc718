"""Equivalent runs train once: how often, what the others get, and that no kill leaves it wrong.

Stages here leave small files that say who made them, but for the tests that train.
"""

import csv
import dataclasses
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from lyco_lab import gamma
from lyco_lab.analyse import unfolded, verdicts
from lyco_lab.config import load_study
from lyco_lab.data.stage import prepare
from lyco_lab.engines import local
from lyco_lab.errors import UserError
from lyco_lab.fold import ASIDE, SAID, folding, set_aside, shared, trained, whose
from lyco_lab.record import STAGES, Record
from lyco_lab.states import failure
from lyco_lab.train import train
from tests.report.shared import small_study

# `half` is `one` with gamma = 1/4 and s = 2; `ninth` with gamma = 1/9 and s = 3; `sixth` is `ninth`
# with s = 2. `stays` is `half` with the decay of `one`.
HALF = {"adapter": {"kind": "lora", "rank": 2, "alpha": 0.5}, "train.init_scale": 2.0}
RUNS = {
    "one": {"adapter": {"kind": "lora", "rank": 2, "alpha": 2.0}, "train.lr": 2.0**-6},
    "half": HALF | {"train.lr": 2.0**-5, "optimizer": {"eps": 5e-9, "weight_decay": 0.05}},
    "ninth": {
        "adapter": {"kind": "lora", "rank": 2, "alpha": 2 / 9},
        "train": {"lr": 3 * 2.0**-6, "init_scale": 3.0},
        "optimizer": {"eps": 1e-8 / 3, "weight_decay": 0.1 / 3},
    },
    "sixth": {
        "adapter": {"kind": "lora", "rank": 2, "alpha": 2 / 9 / 4},
        "train": {"lr": 6 * 2.0**-6, "init_scale": 6.0},
        "optimizer": {"eps": 1e-8 / 3 / 2, "weight_decay": 0.1 / 3 / 2},
    },
    "stays": HALF | {"train.lr": 2.0**-5, "optimizer": {"eps": 5e-9, "weight_decay": 0.1}},
}


FOUR = ("one", "half", "ninth", "stays")


@pytest.fixture
def study(tmp_path, tiny_sd, tiny_concept):
    """Write and load a study of some of RUNS, by default of FOUR."""

    def load(*names, pairs=(), **settings):
        common = {
            "model": {"path": str(tiny_sd), "preset": "attn-only"},
            "data.folder": str(settings.pop("folder", tiny_concept)),
            "optimizer": {"kind": "adamw", "eps": 1e-8, "weight_decay": 0.1},
            "train": {"steps": 6, "warmup_steps": 2, "grad_clip": None, "caption_dropout": 0.0},
            "wandb.mode": settings.pop("wandb", "disabled"),
        }
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        runs = [{"name": name, "set": RUNS[name]} for name in names or FOUR]
        text = {"question": "Q?", "expectation": "E.", "set": common, "runs": runs}
        (folder / "study.yaml").write_text(yaml.safe_dump(text | {"pairs": list(pairs)}))
        return load_study(folder)

    return load


@pytest.fixture
def ran(monkeypatch):
    """Stages that leave who made what, and take up what lies there already, as the true ones do."""
    ran = []

    def train(run, record):
        metrics = record.path / "train" / "metrics.csv"
        begun = metrics.parent / "checkpoints" / "step1.ckpt"
        who = begun.read_text() if begun.is_file() else run.name
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(who)
        metrics.unlink(missing_ok=True)
        metrics.write_text(f"step,loss,lr,grad_norm,delta_norm\n1,{len(who)},0.1,0.2,0.3\n")
        written = record.path / "adapter.safetensors"
        written.unlink(missing_ok=True)
        written.write_text(who)
        record.finish("train", train_seconds=1.5)

    def generate(run, record):
        image = record.path / "generate" / "trigger" / "0.png"
        if not image.is_file():
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_text((record.path / "adapter.safetensors").read_text())
        record.finish("generate")

    def evaluate(run, record):
        image = record.path / "generate" / "trigger" / "0.png"
        (record.path / "evaluate").mkdir(exist_ok=True)
        (record.path / "evaluate" / "metrics.json").write_text(image.read_text())
        record.finish("evaluate")

    def noted(stage, act):
        def noting(run, record):
            if not record.done(stage):
                ran.append((run.name, stage))
                act(run, record)

        return noting

    acts = zip(STAGES, (prepare, train, generate, evaluate), strict=True)
    monkeypatch.setattr(local, "BY_NAME", {name: noted(name, act) for name, act in acts})
    monkeypatch.setattr(local, "conclude", lambda study, root, **how: None)
    return ran


def trainings(ran):
    """The runs that trained since the last call."""
    found = [name for name, stage in ran if stage == "train"]
    ran.clear()
    return found


def folder_of(study, name, root):
    return root / study.run(name).folder_name


def result(folder):
    """What a run's folder tells later stages, without the facts of sharing."""
    names = ("adapter.safetensors", "generate/trigger/0.png", "evaluate/metrics.json")
    return {(folder / name).read_text() for name in names}


def quiet(text):
    pass


def test_one_of_each_class_is_carried_out_and_the_others_have_its_result(study, ran, tmp_path):
    mine, root = study(), tmp_path / "runs"
    local.run_study(mine, root, quiet)
    assert trainings(ran) == ["one", "stays"]
    records = {run.name: Record(root / run.folder_name) for run in mine.runs}
    assert all(record.done(stage) for record in records.values() for stage in STAGES)
    for name, how in (("half", "bit for bit"), ("ninth", "up to rounding")):
        folder = records[name].path
        assert result(folder) == {"one"}
        assert yaml.safe_load((folder / "config.yaml").read_text())["name"] == name
        for stage in STAGES[1:]:
            facts = records[name].facts(stage)
            assert facts.pop("shared_from") == records["one"].path.name
            assert facts.pop("equivalence") == how
            assert facts == records["one"].facts(stage)
        assert "shared_from" not in records[name].facts("data")
        with (folder / "train" / "metrics.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert row == {"step": "1", "loss": "3", "lr": "", "grad_norm": "", "delta_norm": "0.3"}
        assert not (folder / "train" / "checkpoints").exists()
        assert records["one"].path.name in (folder / SAID).read_text()
        assert how in whose(mine.run(name), root) and how in (folder / SAID).read_text()
    assert result(records["stays"].path) == {"stays"}
    assert whose(mine.run("one"), root) == whose(mine.run("stays"), root) == ""
    local.run_study(mine, root, quiet)
    assert trainings(ran) == []


def test_the_one_that_has_trained_gives_its_result(study, ran, tmp_path):
    root = tmp_path / "runs"
    local.run_study(study("half"), root, quiet)
    assert trainings(ran) == ["half"]
    mine = study("one", "half", "ninth")
    local.run_study(mine, root, quiet)
    assert trainings(ran) == []
    assert result(folder_of(mine, "one", root)) == {"half"}


def test_the_one_that_has_begun_goes_on(study, ran, tmp_path):
    mine, root = study(), tmp_path / "runs"
    record = Record.open(root, mine.run("half"))
    (record.path / "train" / "checkpoints").mkdir(parents=True)
    local.run_study(mine, root, quiet)
    assert trainings(ran) == ["half", "stays"]


def test_a_shared_result_is_passed_on_under_the_name_of_who_trained(study, ran, tmp_path):
    root = tmp_path / "runs"
    local.run_study(study("one", "ninth"), root, quiet)
    mine = study("ninth", "sixth")  # without `one`
    assert folding(mine, root).folds["sixth"].how == "bit for bit"
    ran.clear()
    local.run_study(mine, root, quiet)
    assert trainings(ran) == []
    facts = Record(folder_of(mine, "sixth", root)).facts("train")
    one = study("one").run("one").folder_name
    assert (facts["shared_from"], facts["equivalence"]) == (one, "up to rounding")


def test_a_run_that_another_command_trained_meanwhile_gets_no_images(study, ran, tmp_path):
    mine, root = study("one", "half"), tmp_path / "runs"
    local.run_study(study("one"), root, quiet)
    fold = folding(mine, root).folds["half"]
    half = Record.open(root, mine.run("half"))
    for stage in STAGES[:2]:
        local.BY_NAME[stage](mine.run("half"), half)
    for stage in STAGES[1:]:
        local.share(fold, root, stage)
    assert trained(half) and not half.done("generate") and not half.done("evaluate")


def test_no_fold_trains_every_run_and_keeps_what_trained(study, ran, tmp_path):
    mine, root = study(), tmp_path / "runs"
    local.run_study(mine, root, quiet, fold=False)
    assert trainings(ran) == ["one", "half", "ninth", "stays"]
    local.run_study(mine, root, quiet)
    assert trainings(ran) == []
    assert folding(mine, root).folds == {}
    for name in FOUR:
        assert result(folder_of(mine, name, root)) == {name}


def test_no_fold_after_folding_trains_those_that_had_a_shared_result(study, ran, tmp_path):
    mine, root = study(), tmp_path / "runs"
    local.run_study(mine, root, quiet)
    ran.clear()
    local.run_study(mine, root, quiet, fold=False)
    assert trainings(ran) == ["half", "ninth"]
    for name in FOUR:
        folder = folder_of(mine, name, root)
        assert result(folder) == {name}  # of `one` too: what was linked is not written to
        assert trained(Record(folder))
        assert not (folder / ASIDE).exists() and not (folder / SAID).exists()


def test_runs_of_a_pair_train_each_and_a_third_takes_from_them(study, ran, tmp_path):
    root = tmp_path / "runs"
    local.run_study(study("ninth", "one", "half", pairs=[["half", "one"]]), root, quiet)
    assert trainings(ran) == ["one", "half"]


def test_a_pair_trains_what_was_shared_before_and_is_not_judged_without(study, ran, tmp_path):
    root = tmp_path / "runs"
    local.run_study(study("one", "half"), root, quiet)
    ran.clear()
    mine = study("one", "half", pairs=[["one", "half"]])
    with pytest.raises(UserError, match="a pair needs a training of its own"):
        verdicts(mine, root)
    local.run_study(mine, root, quiet)
    assert trainings(ran) == ["half"]
    assert verdicts(mine, root)


def test_changed_training_images_are_not_the_same_run(study, ran, tmp_path, tiny_concept):
    folder = tmp_path / "pictures"
    shutil.copytree(tiny_concept, folder)
    (folder / "manifest.jsonl").unlink()
    root = tmp_path / "runs"
    local.run_study(study("one", folder=folder), root, quiet)
    (folder / "0000.txt").write_text("another caption\n")
    mine = study("one", "half", folder=folder)
    local.run_study(mine, root, quiet)
    failed = failure(Record(folder_of(mine, "half", root)))
    assert re.search(r"'half' cannot .* 'one': the training images.*--no-fold", failed.reason)


@pytest.mark.parametrize("name", ["one", "half"])
def test_a_result_that_is_gone_is_made_again_where_it_was_made(study, ran, tmp_path, name):
    root, mine = tmp_path / "runs", study("one", "half")
    local.run_study(mine, root, quiet)
    file = folder_of(mine, name, root) / "adapter.safetensors"
    whole = file.read_bytes()
    file.unlink()
    ran.clear()
    local.run_study(mine, root, quiet)
    assert trainings(ran) == ["one"] * (name == "one")
    assert file.read_bytes() == whole
    assert trained(Record(folder_of(mine, "one", root)))


def test_where_the_disk_has_no_hard_links_files_are_copied(study, ran, tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", refused)
    mine, root = study("one", "half"), tmp_path / "runs"
    local.run_study(mine, root, quiet)
    assert result(folder_of(mine, "half", root)) == {"one"}


def test_the_folder_says_where_the_run_is_in_wandb(study, ran, tmp_path):
    mine, root = study("one", "half", wandb="offline"), tmp_path / "runs"
    local.run_study(mine, root, quiet)
    said = (folder_of(mine, "half", root) / SAID).read_text()
    assert f"the run {mine.run('one').hash} of the project mine" in said


def test_the_study_of_folding_folds_as_its_table_says(pytestconfig, tmp_path):
    folder = pytestconfig.rootpath / "experiments" / "folding"
    found = folding(load_study(folder), tmp_path)
    assert found.sentence == "26 runs, 13 classes: 13 need no training of their own"
    with (folder / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["claim"] != "different"]
    assert {row["run"]: (row["compared_with"], row["claim"]) for row in rows} == {
        name: (fold.source.name, fold.how) for name, fold in found.folds.items()
    }
    for row in rows:
        bitwise = row["claim"] == "bit for bit"
        assert (row["difference"] == row["worst_layer"] == "0") == bitwise
        assert row["losses_equal"] == str(bitwise).lower()


# A kill at any moment


def until_killed(act, moment):
    """In a process of its own, until just before its `moment`-th change of the disk's names.

    True if it came to its end. Nothing is tidied up by a killed process.
    """
    child = os.fork()
    if child == 0:
        left = [moment]

        def counted(real):
            def change(*args, **kwargs):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return real(*args, **kwargs)

            return change

        for name in ("rename", "replace", "link", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.mark.parametrize(
    "then", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fold", "no fold"]
)
@pytest.mark.parametrize("killed", ["sharing", "setting aside"])
def test_after_a_kill_the_next_run_ends_as_if_there_had_been_none(
    study, ran, tmp_path, monkeypatch, killed, then
):
    mine = study("one", "half")
    before = tmp_path / "before"
    local.run_study(study("one"), before, quiet)
    record = Record.open(before, mine.run("half"))
    prepare(mine.run("half"), record)
    if killed == "sharing":  # with a run that was stopped half trained
        (record.path / "train" / "checkpoints").mkdir(parents=True)
        (record.path / "train" / "checkpoints" / "step1.ckpt").write_text("half")
    if killed == "setting aside":
        local.run_study(mine, before, quiet)
    fold = folding(mine, before).folds["half"]
    # What no kill changes is worked out once.
    known, verdict = gamma.classes(mine.runs), fold.equivalence
    monkeypatch.setattr("lyco_lab.fold.classes", lambda runs: known)
    monkeypatch.setattr("lyco_lab.fold.equivalent", lambda a, b: verdict)
    moment, ended = 0, False
    while not ended:
        root = tmp_path / "runs"
        shutil.copytree(before, root)
        half = Record(folder_of(mine, "half", root))

        def act(root=root, half=half):
            if killed == "setting aside":
                set_aside(half)
            else:
                for stage in ("train", "generate"):
                    local.share(fold, root, stage)

        ended = until_killed(act, moment)
        local.run_study(mine, root, quiet, fold=then)
        assert result(half.path) == {"one" if then else "half"}, moment
        assert shared(half) == then and (half.path / SAID).exists() == then
        assert result(folder_of(mine, "one", root)) == {"one"}
        assert not list(root.rglob(".part-*"))
        shutil.rmtree(root)
        moment += 1
    assert moment > 8


# For real


def test_what_is_folded_trains_to_the_same_and_what_is_not_does_not(study, tmp_path, monkeypatch):
    mine, root = study(), tmp_path / "runs"
    stages = {name: lambda run, record, name=name: record.finish(name) for name in STAGES[2:]}
    real = {"data": prepare, "train": train} | stages
    monkeypatch.setattr(local, "BY_NAME", real)
    monkeypatch.setattr(local, "threads", lambda study, workers: 1)
    monkeypatch.setattr(local, "conclude", lambda study, root, **how: None)
    monkeypatch.setattr("lyco_lab.fold.LEAVES", {"train": ("train", "adapter.safetensors"),
                                                 "generate": (), "evaluate": ()})  # fmt: skip
    local.run_study(mine, root, quiet)
    one, half = (folder_of(mine, name, root) for name in ("one", "half"))
    assert os.path.samefile(one / "adapter.safetensors", half / "adapter.safetensors")
    folded = losses(half)
    assert folded == losses(one) and len(folded) == 6
    local.run_study(mine, root, quiet, fold=False)
    assert not os.path.samefile(one / "adapter.safetensors", half / "adapter.safetensors")
    assert losses(half) == folded
    assert Record(half).facts("train")["steps"] == 6

    found = {each.run: each for each in unfolded.compare(mine, root)}
    assert (found["half"].claim, found["half"].other) == ("bit for bit", "one")
    assert found["half"].holds is True and found["half"].gap == unfolded.Gap(0.0, 0.0)
    assert found["ninth"].claim == "up to rounding" and found["ninth"].holds is None
    assert 0 < found["ninth"].gap.total < found["one"].gap.total / 100
    assert (found["one"].claim, found["one"].other) == ("different", "stays")
    assert found["one"].holds is True and not found["one"].losses.equal
    with (root / "mine" / "folding.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert (rows["half"]["losses_equal"], rows["half"]["first_difference"]) == ("true", "")
    assert (rows["stays"]["losses_equal"], rows["stays"]["compared_with"]) == ("false", "one")

    stays = folder_of(mine, "stays", root)
    for name in ("adapter.safetensors", "train/metrics.csv"):
        shutil.copy(stays / name, half / name)
    Record(half).finish("train", **Record(half).facts("train"))
    found = {each.run: each for each in unfolded.compare(mine, root)}
    assert found["half"].holds is False and "it was claimed, but" in found["half"].sentence


def losses(folder):
    with (folder / "train" / "metrics.csv").open(newline="") as file:
        return [(row["loss"], row["delta_norm"]) for row in csv.DictReader(file)]


def test_tables_and_page_of_a_study_with_shared_results(tmp_path, tmp_path_factory):
    evaluated, made = small_study(tmp_path_factory.getbasetemp() / "evaluated")
    root = tmp_path / "runs"
    shutil.copytree(made, root)
    lora = evaluated.run("lora-kael")
    start = dataclasses.replace(lora.train, lr=lora.train.lr / 2, init_scale=0.5, grad_clip=2.0)
    rule = lora.optimizer | {key: 2 * lora.optimizer[key] for key in ("eps", "weight_decay")}
    alpha = {**lora.adapter, "alpha": 4 * lora.adapter["alpha"]}
    twin = dataclasses.replace(lora, name="twin-kael", train=start, optimizer=rule, adapter=alpha)
    others = [run for run in evaluated.runs if "gamma" not in run.name]
    mine = dataclasses.replace(evaluated, runs=(*others, twin), pairs=())
    outcome = local.run_study(mine, root, quiet)
    rows = outcome.results.set_index("run")
    same = rows.drop(columns=["train_seconds"])
    assert same.loc["twin-kael"].equals(same.loc["lora-kael"])
    page = outcome.report.read_text()
    assert f"twin-kael is {lora.folder_name}, the same bit for bit" in page
    assert outcome.compared == [] and not (Path(root) / "demo" / "folding.csv").exists()
