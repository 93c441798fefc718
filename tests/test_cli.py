"""The command line: quick help, exit codes, one line for a mistake, a plan before any work."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from lyco_lab import cli, console
from lyco_lab.adapters import ADAPTERS
from lyco_lab.analyse.gamma_pair import compare
from lyco_lab.data import folder
from lyco_lab.engines import local
from lyco_lab.errors import Interrupted, UserError
from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.record import STAGES, Record
from lyco_lab.verify.case import VARIANTS
from tests.data import pictures

ROOT = Path(__file__).parents[1]
OUTCOME = local.Outcome(pd.DataFrame(), [], Path("runs/mine/report.html"))
conclude = local.conclude
STUDY = """
question: Does it work?
expectation: It does.
set: {data: {folder: PICTURES}, model: {path: TINY}, train: {steps: 30}}
runs:
  - {name: lora, set: {adapter: {kind: lora, rank: 2}}}
  - {name: native, set: {adapter: {kind: native}}}
"""


@pytest.fixture
def study(tmp_path, tiny_sd, tiny_concept) -> Path:
    path = tmp_path / "mine" / "study.yaml"
    path.parent.mkdir()
    path.write_text(STUDY.replace("TINY", str(tiny_sd)).replace("PICTURES", str(tiny_concept)))
    return path.parent


@pytest.fixture
def lyco_lab(monkeypatch, tmp_path):
    """Run a command in this process; runs/ is in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        words = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["lyco-lab", *words])
        return CliRunner().invoke(cli.app, words)

    return call


@pytest.fixture
def stages(monkeypatch):
    """Stages that only say they ran, and a conclusion out of thin air."""
    ran = []

    def stage(name):
        def act(run, record):
            ran.append((run.name, name))
            record.finish(name)

        return act

    row = {"run": "lora", "concept": "circle", "vendi_trigger": 1.5, "vendi_trigger_se": 0.1}
    verdicts = [compare("a", "b", {0: 0.5, 1: 0.25}, {0: 0.5, 1: 0.25})]
    outcome = replace(OUTCOME, results=pd.DataFrame([row]), verdicts=verdicts)
    monkeypatch.setattr(local, "BY_NAME", {name: stage(name) for name in STAGES})
    monkeypatch.setattr(local, "conclude", lambda study, root, **how: outcome)
    monkeypatch.setattr(local, "check_model", lambda run, record: None)  # no model, no weights
    return ran


def test_help_is_quick():
    for attempt in range(5):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "lyco_lab", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        after = os.times()
        spent_s = sum(after[2:4]) - sum(before[2:4])  # of the child, whatever else is running
        assert done.returncode == 0 and "pretrain" in done.stdout
        if attempt and spent_s < 0.5:  # the first time fills the caches
            return
    pytest.fail(f"--help takes {spent_s:.2f} s of CPU time")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian.lr=1"], "'trian.lr' in the command line (did you mean 'train.lr'?)"),
        (["train.steps=x"], "train.steps is 'x'"),
        (["--wandb", "of"], "wandb.mode is 'of'"),
        (["--wandb", "offline", "wandb.mode=disabled"], "twice"),
        (["data.folder=nowhere"], "nowhere"),
        (["data.folder=null", "data.concept=keal"], "kael"),
        (["model.path=nowhere"], "nowhere"),
        (["data.limit=0"], "data.limit"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(lyco_lab, study, tmp_path, words, part):
    done = lyco_lab("run", study, *words)
    assert done.exit_code == 2
    assert part in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_the_last_run_stops_the_first(lyco_lab, study, stages):
    text = (study / "study.yaml").read_text()
    (study / "study.yaml").write_text(text + "  - {name: last, set: {data.folder: nowhere}}\n")
    done = lyco_lab("run", study)
    assert done.exit_code == 2
    assert "nowhere does not exist (run 'last')" in done.stderr
    assert stages == []


def test_a_folder_that_is_not_a_study(lyco_lab, tmp_path):
    done = lyco_lab("run", tmp_path / "nothing")
    assert done.exit_code == 2
    assert "is not a study" in done.stderr


def test_unknown_options_exit_2_too(lyco_lab, study):
    assert lyco_lab("run", study, "--dryrun").exit_code == 2
    assert lyco_lab("rum").exit_code == 2


def test_dry_run_shows_layers_parameters_and_arithmetic_and_does_nothing(
    lyco_lab, study, tmp_path, stages, tiny_concept
):
    done = lyco_lab("run", study, "--dry-run", "train.batch_size=3")
    assert done.exit_code == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    images = folder.read(tiny_concept)
    samples = images.samples_per_epoch
    for name in ("lora", "native"):
        assert f"{len(images.items)} x 2 = {samples}" in rows[name]
        assert "30 x 3 = 90" in rows[name]
        assert f"{90 / samples:.3g}" in rows[name].split()
        assert " unet" in rows[name]
    assert "Does it work?" in done.stdout and "It does." in done.stdout
    assert stages == [] and not (tmp_path / "runs").exists()


TWICE = """
  - name: twice
    set:
      adapter: {kind: lora, rank: 2, alpha: 0.5}
      optimizer: {eps: 5e-9, weight_decay: 0.005}
      train: {lr: 2e-3, init_scale: 2, grad_clip: 0.5}
"""  # the run `lora` with gamma = 1/4 instead of 1


def test_dry_run_tells_which_runs_are_one_and_why(lyco_lab, study, stages):
    text = (study / "study.yaml").read_text().replace("rank: 2}", "rank: 2, alpha: 2}")
    (study / "study.yaml").write_text(text + TWICE)
    planned = lyco_lab("run", study, "--dry-run").stdout
    lines = [line for line in planned.splitlines() if line]
    assert any("3 runs, 2 classes: 1 needs no training of its own" in line for line in lines)
    rows = {line.split()[0]: line.rstrip() for line in lines}
    assert rows["run"].endswith(" takes") and rows["lora"].endswith("-")
    said = " ".join(planned.split())
    assert "twice is lora with adapter.alpha 0.5 for 2, optimizer.eps 5e-09 for 1e-08, " in said
    assert "factors are s = 2 times as large, and W' is the same bit for bit" in said
    apart = lyco_lab("run", study, "--dry-run", "--no-fold").stdout
    assert "3 runs (in runs)" in apart and "twice is" not in apart

    def total(text):
        return int(text.split(" trained parameters")[0].split()[-1].replace(",", ""))

    each = {name: int(rows[name].split()[3].replace(",", "")) for name in ("lora", "native")}
    assert total(planned) == sum(each.values())
    assert total(apart) == sum(each.values()) + each["lora"]


def test_run_folds_unless_told_otherwise(lyco_lab, study, monkeypatch):
    told = []

    def run_study(study, root, announce, workers, *, fold, **others):
        told.append(fold)
        raise Interrupted("enough")

    monkeypatch.setattr(local, "run_study", run_study)
    for words in ([], ["--fold"], ["--no-fold"]):
        assert lyco_lab("run", study, *words).exit_code == 130
    assert told == [True, True, False]


def test_what_training_apart_showed_is_said(lyco_lab, study, stages, monkeypatch):
    from lyco_lab.analyse.unfolded import Comparison, Gap

    losses = compare("b", "a", {1: 0.5}, {1: 0.5})
    off = compare("c", "a", {1: 0.5}, {1: 0.25})
    compared = [
        Comparison("a", "b", "a", "bit for bit", Gap(0.0, 0.0), losses),
        Comparison("a", "c", "a", "bit for bit", Gap(0.1, 0.2), off),
        Comparison("a", "d", "a", "up to rounding", Gap(1e-6, 1e-5), off),
    ]
    outcome = local.conclude(None, None)
    found = local.Outcome(outcome.results, [], outcome.report, compared)
    monkeypatch.setattr(local, "conclude", lambda study, root, **how: found)
    said = " ".join(lyco_lab("run", study, "--no-fold").stdout.split())
    assert "trained apart b is a bit for bit: W' and all 1 losses are equal" in said
    assert "trained apart c is a bit for bit, it was claimed, but W' differs by 0.1" in said
    assert "trained apart d is a up to rounding: W' differs by 1e-06" in said


@pytest.mark.parametrize("norms", ["false", "true"])
def test_dry_run_counts_what_training_would_mount(study, norms):
    from lyco_lab.config import load_study
    from lyco_lab.dry_run import plan
    from lyco_lab.train import stage

    asked = ["model.text_encoder=true", "model.preset=full", f"model.train_norm={norms}"]
    for planned in plan(load_study(study, asked)):
        mounted = stage.mount(planned.run, stage.frozen(planned.run))
        assert planned.layers == {part: len(m.layers) for part, m in mounted.items()}
        count = sum(p.numel() for m in mounted.values() for p in m.parameters())
        assert planned.params == count


@pytest.mark.parametrize(
    ("adapter", "narrow"), [("{kind: lora, rank: 8}", 1), ("{kind: lokr, rank: 10000}", 0)]
)
def test_a_dry_run_tells_of_ranks_that_are_cut_down(lyco_lab, study, adapter, narrow):
    """On `conv_out`, which has 4 outputs; full blocks have no rank."""
    file = study / "study.yaml"
    file.write_text(file.read_text().replace("{kind: lora, rank: 2}", adapter))
    done = lyco_lab("run", study, "--dry-run", "model.preset=full")
    assert done.exit_code == 0
    said = "up to 1 of a run's layers are narrower than its rank"
    assert [said in done.stdout, "narrower" in done.stdout] == [narrow == 1] * 2


def test_a_dry_run_says_whose_words_are_the_captions(lyco_lab, study, tmp_path):
    for i in range(2):
        pictures.image(tmp_path / "in" / "3_sks dog" / f"{i}.png")
    done = lyco_lab("run", study, "--dry-run", f"data.folder={tmp_path / 'in'}")
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "2 of 2 images have the words of their folder as caption (the first: " in said


@pytest.mark.parametrize(("repeats", "limit"), [(None, None), (3, None), (None, 2), (3, 100)])
def test_a_concept_is_counted_as_its_folder_would_be(tmp_path, repeats, limit):
    from lyco_lab import dry_run
    from lyco_lab.config import Data, Run
    from lyco_lab.miniature import concepts

    concepts.write(concepts.concept("falls"), tmp_path)
    written = folder.read(tmp_path, repeats, limit)
    data = Data(concept="falls", repeats=repeats, limit=limit)
    counted = dry_run._count(Run(name="r", study="s", data=data), None)
    assert counted[:2] == (len(written.items), written.samples_per_epoch)


def test_run_does_every_stage_of_every_run_and_shows_the_outcome(lyco_lab, study, stages):
    done = lyco_lab("run", study)
    assert done.exit_code == 0, done.stderr
    assert stages == [(run, stage) for run in ("lora", "native") for stage in STAGES]
    assert "[8/8] native: evaluate, about 0:00 left" in done.stdout
    assert "1.5" in done.stdout and "report: runs/mine/report.html" in done.stdout
    assert "all 2 losses are bitwise equal" in done.stdout


def test_run_again_skips_what_is_done(lyco_lab, study, stages):
    lyco_lab("run", study)
    stages.clear()
    done = lyco_lab("run", study)
    assert done.exit_code == 0 and stages == []
    assert "8 of 8 stages are done already" in done.stdout
    planned = lyco_lab("run", study, "--dry-run")
    assert ", ".join(STAGES) in planned.stdout


def test_what_changes_only_the_labels_is_not_run_again(lyco_lab, study, stages):
    lyco_lab("run", study)
    stages.clear()
    assert lyco_lab("run", study, "--wandb", "disabled").exit_code == 0
    assert stages == []
    lyco_lab("run", study, "train.steps=31")
    assert len(stages) == 8


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("saved at step 7")])
def test_an_interruption_exits_130_and_says_how_to_go_on(
    lyco_lab, study, stages, monkeypatch, error
):
    def stop(run, record):
        raise error

    monkeypatch.setitem(local.BY_NAME, "train", stop)
    done = lyco_lab("run", study, "seed=3")
    assert done.exit_code == 130
    assert f"to go on: lyco-lab run {study} seed=3" in done.stderr
    assert str(error) in done.stderr
    monkeypatch.setitem(local.BY_NAME, "train", lambda run, record: record.finish("train"))
    assert lyco_lab("run", study, "seed=3").exit_code == 0
    assert stages.count(("lora", "data")) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_real_process(tmp_path, number, code):
    command = [sys.executable, "-m", "lyco_lab", "world", str(tmp_path), "--count", "20000"]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    began_s = time.monotonic()
    while child.poll() is None and not _draws(child.pid):
        assert time.monotonic() - began_s < 60
        time.sleep(0.1)
    time.sleep(1)
    child.send_signal(number)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == code, stderr
    assert "to go on: lyco-lab world" in stderr


def test_errors_that_are_no_mistake_of_the_user_are_not_hidden(
    lyco_lab, study, stages, monkeypatch, tmp_path
):
    def fail(run, record):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(local, "conclude", conclude)
    monkeypatch.setitem(local.BY_NAME, "data", fail)
    done = lyco_lab("run", study)
    assert done.exit_code == 1
    assert "lora failed in data: ZeroDivisionError: a bug (traceback: runs/lora-" in done.stderr
    (file,) = (tmp_path / "runs").glob("lora-*/failed/data.txt")
    text = file.read_text()
    assert (
        text.startswith("ZeroDivisionError: a bug\n") and 'raise ZeroDivisionError("a bug")' in text
    )
    assert f"command: lyco-lab run {study}" in text and "stage: data" in text
    # Not a second time unless asked to.
    stages.clear()
    monkeypatch.setitem(local.BY_NAME, "data", lambda run, record: record.finish("data"))
    again = lyco_lab("run", study)
    assert again.exit_code == 1 and stages == []
    assert "lora failed in data before and is not tried again without --retry-failed" in " ".join(
        again.stdout.split()
    )
    monkeypatch.setattr(local, "conclude", lambda study, root, **how: OUTCOME)
    assert lyco_lab("run", study, "--retry-failed").exit_code == 0
    assert len(stages) == 6 and not list((tmp_path / "runs").glob("*/failed"))


def test_a_configuration_that_was_changed_in_a_run_folder_is_written_anew(
    lyco_lab, study, stages, tmp_path
):
    """The folder is named by a digest of its own, which tells."""
    lyco_lab("run", study)
    (config,) = (tmp_path / "runs").glob("lora-*/config.yaml")
    before = config.read_text()
    config.write_text(before.replace("rank: 2", "rank: 3"))
    done = lyco_lab("run", study)
    assert done.exit_code == 0 and config.read_text() == before
    assert "config.yaml was damaged, and is written anew" in " ".join(done.stdout.split())


def test_an_out_folder_that_cannot_be_written(lyco_lab, study, stages, tmp_path):
    (tmp_path / "file").write_text("")
    done = lyco_lab("run", study, "--out", tmp_path / "file")
    assert done.exit_code == 2
    assert f"cannot write in {tmp_path / 'file'}" in done.stderr


def test_report_needs_runs_that_are_done(lyco_lab, study):
    done = lyco_lab("report", study)
    assert done.exit_code == 2
    assert "run the study first" in done.stderr


def test_report_shows_the_outcome_again(lyco_lab, study, stages):
    done = lyco_lab("report", study)
    assert done.exit_code == 0 and "report: " in done.stdout
    assert stages == []


def test_world_writes_folders_that_are_read_as_training_data(lyco_lab, tmp_path):
    done = lyco_lab("world", tmp_path / "w", "--count", 3)
    assert done.exit_code == 0, done.stderr
    assert len(folder.read(tmp_path / "w" / "world").items) == 3
    kael = folder.read(tmp_path / "w" / "concepts" / "kael")
    assert kael.trigger and kael.class_word and len(kael.items) > 3


def test_pretrain_is_told_where_and_how(lyco_lab, tmp_path, monkeypatch):
    import lyco_lab.miniature.pretrain as package

    told = []
    quality = {"accuracy": {"real": {"hair": 0.5}}, "mean": {"real": 0.5}, "psnr_db": 20.0,
               "caption_first_of_100": 0.25}  # fmt: skip
    monkeypatch.setattr(
        package, "pretrain", lambda out, *, quick: told.append((out, quick)) or quality
    )
    made = lyco_lab("pretrain", tmp_path / "w", "--quick")
    assert made.exit_code == 0 and "| hair | 0.500 |" in made.output
    assert told == [(tmp_path / "w", True)]


def test_an_engine_refuses_before_it_begins(study, tmp_path):
    from lyco_lab.config import load_study

    loaded = load_study(study)
    Record.open(tmp_path / "runs", loaded.runs[1]).path.joinpath("config.yaml").write_text("")
    began = []
    with pytest.raises(UserError, match=r"config\.yaml"):
        local.run_study(loaded, tmp_path / "runs", announce=began.append)
    assert began == []


def _draws(pid: int) -> bool:
    """Whether the process has loaded what it draws with, which it does last."""
    return "_imaging" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--log-level", "debg", "doctor"], "did you mean 'debug'?"),
        (["verify", "--gamma", "1", "--gamma", "2"], "--gamma is given twice: leave one out"),
        (["run", "x", "--fold", "--no-fold"], "--fold is given twice"),
        (["run"], "Missing argument"),
        (["rnu"], "No such command"),
        (["run", "x", "--ot", "y"], "No such option"),
        (["world", "x", "--count", "many"], "valid integer"),
        (["pretrain", "/proc/x"], "cannot write in /proc/x-work: no such file or directory"),
        (["run", "a" * 5000], "is not a study"),
        (["run", "\x1b[31m"], r"\x1b[31m is not a study"),
    ],
)
def test_a_command_that_is_called_wrongly(lyco_lab, words, part):
    done = lyco_lab(*words)
    assert done.exit_code == 2 and part in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_version(lyco_lab):
    done = lyco_lab("--version")
    assert done.exit_code == 0 and re.fullmatch(r"\d+\.\d+\.\d+\S*\n", done.stdout)


def test_what_is_read_as_markup_elsewhere_is_shown_as_it_stands(lyco_lab, study):
    text = (study / "study.yaml").read_text()
    odd = r'"Is [/] or [red]x[/red] :smile: \\[ \a fine?"'
    text = text.replace("Does it work?", odd)
    (study / "study.yaml").write_text(text.replace("It does.", "'[bold] [/b]'"))
    done = lyco_lab("run", study, "--dry-run")
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert r"mine: Is [/] or [red]x[/red] :smile: \[ \x07 fine?" in shown
    assert "expected: [bold] [/b]" in shown


def test_the_level_of_messages_says_what_is_read_and_where_errors_come_from(
    lyco_lab, study, caplog, monkeypatch
):
    for name in (console.LEVEL_VARIABLE, "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    level = logging.getLogger().level
    monkeypatch.setattr(logging, "basicConfig", lambda **how: logging.getLogger().setLevel(
        how["level"]))  # fmt: skip
    try:
        for wanted in ("info", "debug"):
            caplog.clear()
            done = lyco_lab("--log-level", wanted, "run", study, "train.steps=x")
            assert done.exit_code == 2 and done.stderr.count("\n") == 1
            assert (f"read {study / 'study.yaml'}" in caplog.text) == (wanted == "debug")
            assert ("Traceback" in caplog.text) == (wanted == "debug")
    finally:
        logging.getLogger().setLevel(level)


def test_tables_are_never_cut(capsys):
    titles = ["run", *(f"column {i}" for i in range(20)), "very" * 30]
    rows = [["a-long-name-of-a-run" * 2, *(f"{i}.{i}{i}" for i in range(20)), "[/]"]]
    screen = Console(width=60, markup=False, emoji=False, file=io.StringIO())
    console.show_table(screen, titles, rows)
    shown = screen.file.getvalue()
    assert "…" not in shown and all(len(line.rstrip()) <= 60 for line in shown.splitlines())
    for cell in (*titles[:-1], *rows[0]):
        assert cell in shown
    assert shown.count(rows[0][0]) > 2  # which run a value is of is said in each part
    assert "".join(shown.split()).count("very") == 30


def test_help_lists_what_verify_knows():
    assert cli.ADAPTERS.split(", ") == sorted({*ADAPTERS, *VARIANTS})
    assert cli.OPTIMIZERS.split(", ") == sorted(OPTIMIZERS)
