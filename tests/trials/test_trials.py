"""A sample of each kind of trial, and that the trials see what they should."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trials import child, damages, hostile, interruptions, studies, study
from tests.trials.table import OK, Row, Table

SAMPLES = {  # kinds that one process tries, and how many of each
    "damages": (["damages"], 8),
    "interruptions": (["interruptions"], 3),
    "mutations": (["studies", "commands", "adapters"], 20),
    "failures": (["failures"], 1),
}


# Outputs are no more compared with their digests, and nothing looks for damage.
PLANTED = """
import sys
from pathlib import Path
from lyco_lab import record
from tests.trials import child, damages, study

record._fault_of = lambda path, noted: None
damages.can_check = lambda: False
work = Path(sys.argv[1])
made = study.finished(work, "whole", study.WHOLE)
for file in ("adapter.safetensors", "evaluate/metrics.json"):
    numbers = (n for n in range(1000) if damages.draw(made.root, 0, n).action == "flip")
    number = next(n for n in numbers if damages.draw(made.root, 0, n).file.endswith(file))
    print(damages.trial(work, 0, number).verdict)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Keeps the finished studies."""
    return tmp_path_factory.mktemp("trials")


@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLES)
def test_a_sample_ends_well(sample, work, tmp_path):
    kinds, count = SAMPLES[sample]
    done = subprocess.run(
        [sys.executable, "-m", "tests.trials", *kinds, "--count", str(count),
         "--work", str(work), "--results", str(tmp_path / "results")],
        cwd=study.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_damage_that_nothing_looks_for_is_silent(work):
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, str(work)],
        cwd=study.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    found = done.stdout.splitlines()
    assert found[0] == "run: silent" and found[1] != OK, done.stdout + done.stderr


def _raises():
    raise ValueError("nobody expects it")


def _dies():
    os.kill(os.getpid(), signal.SIGKILL)


def _waits():
    time.sleep(60)
    return 0


def _grows():
    held = bytearray(500 * child.MIB)
    held[:: child.MIB // 256] = b"x" * len(held[:: child.MIB // 256])
    return 0


def _says_two_lines():
    print("error: one\nand another", file=sys.stderr)
    return 2


def _says_one_line():
    print("error: one", file=sys.stderr)
    return 2


@pytest.mark.parametrize(
    ("call", "verdict"),
    [
        (_raises, "traceback"),
        (_dies, "abort"),
        (_waits, "stuck"),
        (_grows, "memory"),
        (_says_two_lines, "not one line"),
        (_says_one_line, OK),
        (lambda: 3, "exit code"),
        (lambda: 0, OK),
    ],
)
def test_the_verdict_on_a_child(call, verdict):
    assert studies.judged(child.forked(call, limit_s=1 if call is _waits else 60)) == verdict


@pytest.fixture
def some_files(tmp_path):
    for name in (
        "lora-01234567/adapter.safetensors",
        "lora-01234567/done/train.json",
        "lora-01234567/.lock",
        "loha-89abcdef/adapter.safetensors",
        "base/kael-01234567/alter/0000.png",
        "base/kael-01234567/trigger/0001.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name.endswith(".lock") else bytes(range(256)))
    return tmp_path


def test_every_kind_of_file_meets_every_damage_before_one_is_met_twice(some_files):
    kinds = damages.files(some_files)
    assert sorted(map(len, kinds.values())) == [1, 1, 2, 2]
    drawn = [damages.draw(some_files, 0, number) for number in range(13)]
    met = {(damages.kind_of(damage.file), damage.action) for damage in drawn}
    assert met == {(kind, "delete") for kind in kinds} | {
        (kind, action) for kind in kinds for action in damages.ACTIONS if not kind.endswith(".lock")
    }
    assert drawn == [damages.draw(some_files, 0, number) for number in range(13)]
    assert drawn != [damages.draw(some_files, 1, number) for number in range(13)]


@pytest.mark.parametrize("action", damages.ACTIONS)
def test_a_damage_changes_its_file_and_no_other(some_files, action):
    before = {p: p.read_bytes() for p in some_files.rglob("*") if p.is_file()}
    name = "loha-89abcdef/adapter.safetensors"
    damages.Damage(name, action, 0.5, 3, (name,)).strike(some_files)
    after = {p: p.read_bytes() for p in some_files.rglob("*") if p.is_file()}
    path = some_files / name
    assert {p for p in before if before[p] != after.get(p)} == {path}
    assert len(after.get(path, b"")) == {"flip": 256, "cut": 128, "empty": 0, "delete": 0}[action]


def test_mutations_are_drawn_by_their_number_alone():
    text = "".join((study.HEAD, *study.WHOLE)).format(base="base.yaml", pictures="pictures")
    for edit in set(hostile.EDITS):
        made = [edit(text, random.Random(f"{seed}")) for seed in (0, 0, 1)]
        assert made[0] == made[1] != made[2], edit
        assert made[0] != text, edit


def test_interruptions_meet_every_case():
    drawn = [interruptions.draw(0, number) for number in range(interruptions.KIND.count)]
    met = {(each.workers, each.whom, each.number) for each in drawn}
    assert len(met) == 3 * (2 + 3)
    assert any(each.second_s is not None for each in drawn)


def test_the_process_of_a_session_is_found_and_ended(tmp_path):
    begun = subprocess.Popen(["sleep", "60"], start_new_session=True)
    assert interruptions.session(begun.pid) == [begun.pid]
    interruptions.end(begun.pid)
    begun.wait()
    assert interruptions.session(begun.pid) == []


def test_a_table_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "results" / "x.csv"
    rows = [Row("x", n, "a,\nb", "flip", OK, 0, 1.5, 2.0, seed=0, library="t") for n in range(3)]
    table = Table(path, 0, "t")
    table.begin({})
    for row in (rows[2], rows[0]):
        table.add(row)
    assert Table(path, 1, "t").known() == Table(path, 0, "u").known() == {}
    known = table.known()
    assert [known[n].target for n in (0, 2)] == ["a,\nb"] * 2
    table.begin(known)
    table.add(rows[1])
    assert list(table.known()) == [0, 2, 1]
    table.sort()
    assert list(table.known()) == [0, 1, 2]


def test_results_differ_where_a_number_does(some_files):
    before = study.results(some_files)
    assert set(before) == {
        "lora-01234567/adapter.safetensors", "loha-89abcdef/adapter.safetensors",
        "base/kael-01234567/alter/0000.png", "base/kael-01234567/trigger/0001.png",
    }  # fmt: skip
    (some_files / "loha-89abcdef/adapter.safetensors").write_bytes(b"x")
    (some_files / "lora-01234567/done/train.json").unlink()
    assert study.differing(before, study.results(some_files)) == [
        "loha-89abcdef/adapter.safetensors"
    ]


def test_times_are_no_results(tmp_path):
    for name, seconds in (("a", 1), ("b", 2)):
        (tmp_path / name / "tiny").mkdir(parents=True)
        text = f"run,score,train_seconds\nlora,0.5,{seconds}\n"
        (tmp_path / name / "tiny" / "results.csv").write_text(text)
    assert study.tables(tmp_path / "a") == study.tables(tmp_path / "b") != {}


def test_the_work_folder_keeps_its_pictures(tmp_path):
    study.draw(tmp_path / "pictures")
    times = {p: p.stat().st_mtime_ns for p in Path(tmp_path / "pictures").iterdir()}
    assert len(times) == 12
    study.draw(tmp_path / "pictures")
    assert times == {p: p.stat().st_mtime_ns for p in Path(tmp_path / "pictures").iterdir()}


def test_a_command_hears_signals_that_the_trials_were_started_to_ignore(monkeypatch):
    waits = [sys.executable, "-c", "import time; print('[1/1] ', flush=True); time.sleep(60)"]
    monkeypatch.setattr(study, "command", lambda *arguments: waits)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        begun = interruptions.begin([])
        assert begun.until(1, 60)
        begun.process.send_signal(signal.SIGINT)
        assert begun.finish(60) == -signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)
