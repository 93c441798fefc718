"""A run that fails leaves the others alone; which runs there are to be is a matter of names."""

import re
import threading
import time

import pytest

from lyco_lab.config import Data, Run, Study, Train, Wandb
from lyco_lab.engines import local
from lyco_lab.errors import UserError
from lyco_lab.files import locked, owner
from lyco_lab.record import STAGES, Record
from lyco_lab.states import fail, failure, forgive, missing
from lyco_lab.workers import Failed


def run_of(name, factor=1.0, **settings):
    """Runs of any `factor` are one run by the theorem on gamma, where it is a power of two."""
    return Run(
        name=name,
        study="mine",
        data=Data(concept="falls"),
        adapter={"kind": "lora", "rank": 2, "alpha": 2.0 / factor**2},
        train=Train(
            steps=6, warmup_steps=2, lr=2.0**-6 * factor, init_scale=factor, grad_clip=None
        ),
        optimizer={"kind": "adamw", "eps": 1e-8 / factor, "weight_decay": 0.125 / factor},
        wandb=Wandb(mode="disabled"),
        **settings,
    )


def study_of(*runs, pairs=()):
    return Study("mine", "Does it?", "It does.", folder=None, runs=tuple(runs), pairs=pairs)


@pytest.fixture
def ran(monkeypatch):
    """Stages that say which of them ran; a stage fails if it is in `bad`."""

    class Ran(list):
        bad: set = set()

    found = Ran()

    def stage(name):
        def act(run, record):
            found.append((run.name, name))
            if (run.name, name) in found.bad:
                raise UserError(f"{name} is impossible\n  with [b]{run.name}[/b]")
            (record.path / "train").mkdir(exist_ok=True)
            for file in ("adapter.safetensors", "generate", "evaluate"):
                (record.path / file).touch()
            facts = {"digest": "d", "model": "m"} if name == "data" else {}
            record.finish(name, **facts)

        return act

    monkeypatch.setattr(local, "BY_NAME", {name: stage(name) for name in STAGES})
    monkeypatch.setattr(local, "check_model", lambda run, record: None)
    monkeypatch.setattr(local, "plugs", lambda run: None)
    monkeypatch.setattr(local, "analyse", lambda study, root: (study, list(study.pairs)))
    monkeypatch.setattr(local.page, "write", lambda study, root, *more: root / "report.html")
    return found


def done(root, run):
    record = Record(root / run.folder_name)
    return [stage for stage in STAGES if record.done(stage)]


def test_a_failed_run_is_written_down_and_the_others_go_on(ran, tmp_path):
    runs = [run_of(name, seed=seed) for seed, name in enumerate("abc")]
    ran.bad = {("b", "train")}
    said = []
    outcome = local.run_study(study_of(*runs, pairs=(("a", "b"),)), tmp_path, said.append)
    assert [len(done(tmp_path, run)) for run in runs] == [4, 1, 4]
    (lost,) = outcome.missing
    assert (lost.name, lost.sentence) == ("b", "failed in train: train is impossible with [b]b[/b]")
    assert lost.failure.file == tmp_path / runs[1].folder_name / "failed" / "train.txt"
    text = lost.failure.file.read_text()
    assert text.startswith("train is impossible with [b]b[/b]\n")
    for part in ("stage: train", "command: lyco-lab", "Traceback", "in act", "process: "):
        assert part in text
    assert re.search(r"time: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]", text)
    assert [run.name for run in outcome.results.runs] == ["a", "c"] and outcome.verdicts == []
    assert outcome.unjudged == [f"a and b: not available, since b {lost.sentence}"]
    assert any("b: train FAILED: train is impossible" in line for line in said)


def test_a_failed_run_is_tried_again_on_request_alone(ran, tmp_path):
    study = study_of(*[run_of(name, seed=seed) for seed, name in enumerate("ab")])
    ran.bad = {("b", "generate")}
    local.run_study(study, tmp_path, print)
    ran.clear()
    ran.bad = set()
    said = []
    assert local.run_study(study, tmp_path, said.append).missing[0].failure is not None
    assert ran == [] and any("b failed in generate before" in line for line in said)
    assert local.run_study(study, tmp_path, print, retry_failed=True).missing == []
    assert ran == [("b", "generate"), ("b", "evaluate")]
    assert not (tmp_path / study.runs[1].folder_name / "failed").exists()


def test_all_fail_and_there_is_no_page(ran, tmp_path):
    ran.bad = {("a", "data")}
    outcome = local.run_study(study_of(run_of("a")), tmp_path, print)
    assert outcome.report is None and [each.name for each in outcome.missing] == ["a"]


def test_runs_that_were_to_take_the_result_train_themselves(ran, tmp_path):
    """One of them, and the other takes its result."""
    one, two, four = (run_of(name, factor) for name, factor in (("1", 1), ("2", 2), ("4", 4)))
    study = study_of(one, two, four)
    assert set(local.folding(study, tmp_path).folds) == {"2", "4"}
    ran.bad = {("1", "train")}
    local.run_study(study, tmp_path, print)
    assert [len(done(tmp_path, run)) for run in study.runs] == [1, 4, 4]
    assert [name for name, stage in ran if stage == "train"] == ["1", "2"]
    assert Record(tmp_path / four.folder_name).facts("train")["shared_from"] == two.folder_name
    ran.clear()
    ran.bad = set()
    local.run_study(study, tmp_path, print, retry_failed=True)
    assert len(done(tmp_path, one)) == 4 and ran == []  # it is one of the others now


def test_a_run_goes_on_by_itself_with_a_training_that_it_took(ran, tmp_path):
    one, two = run_of("1"), run_of("2", 2)
    ran.bad = {("1", "generate")}
    local.run_study(study_of(one, two), tmp_path, print)
    assert (len(done(tmp_path, one)), len(done(tmp_path, two))) == (2, 4)
    assert ("2", "train") not in ran and ("2", "generate") in ran


def test_part_of_a_study_by_name_and_number(ran, tmp_path):
    runs = [run_of(name, seed=s) for s, name in enumerate(("lora-a", "lora-b", "loha-a", "loha-b"))]
    study = study_of(*runs)
    outcome = local.run_study(study, tmp_path, print, only=["lora-*", "*-b"], limit=2)
    assert {name for name, _ in ran} == {"lora-a", "lora-b"}
    assert [(m.name, m.sentence) for m in outcome.missing] == [
        ("loha-a", "data is not done"),
        ("loha-b", "data is not done"),
    ]
    assert not (tmp_path / runs[2].folder_name).exists()
    ran.clear()
    local.run_study(study, tmp_path, print, limit=1)
    assert {name for name, _ in ran} == {"loha-a"}  # what is done does not count
    with pytest.raises(UserError, match=r"--only is 'lora_a', which .*\(did you mean 'lora-a'\?\)"):
        local.run_study(study, tmp_path, print, only=["lora_a"])


def test_a_run_whose_source_is_left_out_trains_unless_the_source_is_done(ran, tmp_path):
    one, two = run_of("1"), run_of("2", 2)
    local.run_study(study_of(one, two), tmp_path / "apart", print, only=["2"])
    assert ("2", "train") in ran
    local.run_study(study_of(one, two), tmp_path / "after", print, only=["1"])
    ran.clear()
    local.run_study(study_of(one, two), tmp_path / "after", print, only=["2"])
    assert ran == [("2", "data")]


def test_a_mistake_that_is_seen_beforehand_is_nobodys_failure(ran, tmp_path, monkeypatch):
    def refuse(run, record):
        raise UserError("other weights")

    monkeypatch.setattr(local, "check_model", refuse)
    with pytest.raises(UserError, match="other weights"):
        local.run_study(study_of(run_of("a")), tmp_path, print)
    assert ran == [] and not list(tmp_path.glob("*/failed"))


def test_states(tmp_path):
    run = run_of("a")
    record = Record.open(tmp_path, run)
    assert missing("a", record).sentence == "data is not done"
    with locked(record.path):
        assert re.fullmatch(r"data is running \(process \d+ on .* since .*\)",
                            missing("a", record).sentence)  # fmt: skip
    assert owner(record.path) == ""  # its last holder's name is still in the lock
    fail(record, "data", "no disk", "Traceback")
    assert missing("a", record).failure == failure(record)
    assert Record.open(tmp_path, run) == record
    record.finish("data")
    assert failure(record) is None and missing("a", record).stage == "train"
    forgive(record)
    assert not (record.path / "failed").exists()
    record.mark_file("data").write_bytes(b"")
    assert "data is not known to be done: " in missing("a", record).sentence
    assert "data.json is damaged" in missing("a", record).sentence


def test_whom_one_waits_for_is_said(tmp_path, capsys):
    def wait():
        with locked(tmp_path):
            pass

    with locked(tmp_path):
        other = threading.Thread(target=wait)
        other.start()
        time.sleep(1.3)
    other.join()
    said = capsys.readouterr().out
    assert re.match(r"waiting for .*, which is in use by process \d+ on .+ since \d", said)


def test_a_lock_with_another_name_is_not_written_to(tmp_path):
    (tmp_path / "precious").write_text("data")
    (tmp_path / ".lock").hardlink_to(tmp_path / "precious")
    with locked(tmp_path):
        assert owner(tmp_path) == "another process"
    assert (tmp_path / "precious").read_text() == "data"


# How long it takes


def queue_of(*jobs):
    return local.Queue(lambda runs: [list(job) for job in jobs if runs], [None])


def test_time_left_is_that_of_the_slot_that_ends_last(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(local.time, "monotonic", lambda: now[0])
    a, b, c = (run_of(name) for name in "abc")
    jobs = [[local.Step(run, "data"), local.Step(run, "train", size=n)] for run, n in
            ((a, 10), (b, 20), (c, 5))]  # fmt: skip
    queue = queue_of(*jobs)
    assert queue.left_s(2) is None and queue.total == 6
    for slot in (0, 1):
        queue.take(slot)
        queue.done(slot, 1.0)
    assert queue.left_s(2) is None  # no training was timed
    queue.take(0), queue.take(1)
    now[0] = 10.0
    queue.done(0, 10.0)  # a second a step
    # Slot 0 does all of c in 1 + 5 s; slot 1 has 20 - 10 s to go.
    assert queue.left_s(2) == 10.0
    now[0] = 18.0
    assert queue.left_s(2) == 6.0
    now[0] = 40.0  # longer than thought
    assert queue.left_s(2) == 6.0
    assert (queue.finished, queue.total) == (3, 6)


def test_steps_of_a_failed_run_are_not_counted_any_more():
    a, b = run_of("a"), run_of("b")
    queue = queue_of([local.Step(a, s) for s in STAGES], [local.Step(b, s) for s in STAGES])
    queue.plan = lambda runs: []
    assert queue.take().run is a
    queue.failed(0)
    assert (queue.finished, queue.total) == (1, 5)
    assert [queue.take().run, len(queue.left())] == [b, 4]


def test_what_a_run_prints_has_its_name():
    said = []
    lines = local.Lines("lora", said.append)
    print("6 images\n\n4 of", "them", file=lines)
    print("lora: goes on", file=lines)
    lines.write("no end")
    lines.finish()
    assert said == ["lora: 6 images", "lora: 4 of them", "lora: goes on", "lora: no end"]


def test_a_failure_says_what_kind_of_error_it_was_unless_it_is_the_users():
    assert Failed.by(UserError("a\n b")).reason == "a b"
    assert Failed.by(KeyError("x")).reason == "KeyError: 'x'"
    assert Failed.by(SystemExit()).reason == "SystemExit"
