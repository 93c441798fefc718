"""The run folder: complete files only, one configuration only, clear words when it cannot write."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab import files
from lyco_lab.errors import UserError
from lyco_lab.files import atomic, locked
from lyco_lab.record import Record, digest, identity

CONFIG = {"name": "lora", "study": "demo", "seed": 0, "train": {"lr": 1e-3, "betas": [0.9, 0.99]}}
keys = st.text("abcdef", min_size=1, max_size=4)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
configs = st.dictionaries(keys, st.one_of(scalars, st.dictionaries(keys, scalars, max_size=3)))


@dataclass
class Run:
    config: dict = field(default_factory=lambda: json.loads(json.dumps(CONFIG)))
    folder_name: str = f"lora-{digest(CONFIG)}"

    def to_dict(self):
        return self.config


def parts(folder: Path) -> list[Path]:
    return list(folder.rglob(".part-*"))


def test_atomic_writes_the_file_and_leaves_nothing_else(tmp_path):
    with atomic(tmp_path / "deep" / "x.txt") as temporary:
        assert temporary.name == "x.txt"
        temporary.write_text("new")
        assert not (tmp_path / "deep" / "x.txt").exists()
        assert list((tmp_path / "deep").glob("*.txt")) == []  # nor does a listing see it
    assert (tmp_path / "deep" / "x.txt").read_text() == "new"
    assert parts(tmp_path) == []


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="in the middle"), atomic(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("in the middle")
    assert target.read_text() == "old"
    assert parts(tmp_path) == []


def test_a_kill_while_writing_keeps_the_old_file_and_reopening_clears_the_half(tmp_path):
    run = Run()
    opened = Record.open(tmp_path, run)
    target = opened.path / "checkpoint"
    target.write_text("old")
    script = (
        "import os, signal; from pathlib import Path; from lyco_lab.files import atomic\n"
        f"with atomic(Path({str(target)!r})) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script])
    assert killed.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert len(parts(opened.path)) == 1
    Record.open(tmp_path, run)
    assert parts(opened.path) == []
    assert target.read_text() == "old"


def test_reopening_leaves_alone_what_another_process_is_writing(tmp_path):
    opened = Record.open(tmp_path, Run())
    with locked(opened.path), atomic(opened.path / "x") as temporary:
        temporary.write_text("nearly")
        Record.open(tmp_path, Run())
    assert (opened.path / "x").read_text() == "nearly"


def test_a_locked_folder_is_waited_for(tmp_path):
    script = (
        "from pathlib import Path; from lyco_lab.files import locked\n"
        f"with locked(Path({str(tmp_path)!r})): Path({str(tmp_path / 'x')!r}).touch()"
    )
    with locked(tmp_path):
        waiter = subprocess.Popen([sys.executable, "-c", script])
        with pytest.raises(subprocess.TimeoutExpired):
            waiter.wait(timeout=2)
        assert not (tmp_path / "x").exists()
    assert waiter.wait(timeout=60) == 0 and (tmp_path / "x").exists()


def test_a_lock_is_never_another_file(tmp_path):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").symlink_to(thesis)
    for use in (lambda: locked(folder).__enter__(), lambda: files.sweep(folder)):
        with pytest.raises(UserError, match=r"\.lock is a link.*delete the link"):
            use()
    assert thesis.read_text() == "years of work"
    (folder / ".lock").unlink()
    os.link(thesis, folder / ".lock")
    with locked(folder):
        assert thesis.read_text() == "years of work"
    os.remove(folder / ".lock")
    os.mkfifo(folder / ".lock")
    with pytest.raises(UserError, match="no regular file"), locked(folder):
        pass


def test_a_writer_that_wrote_nothing_is_noticed(tmp_path):
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "x"):
        pass


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="folder of that name"), atomic(tmp_path / "x"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*file.*not a directory"):
        Record.open(tmp_path / "file" / "runs", Run())
    with pytest.raises(UserError, match="cannot write in"), atomic(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_missing_rights_are_a_user_error(tmp_path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match=f"cannot write in {tmp_path}"), atomic(tmp_path / "x"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_user_error_and_keeps_the_old_file(tmp_path, number):
    target = tmp_path / "x"
    target.write_text("old")
    full = pytest.raises(UserError, match=f"no space left to write in {tmp_path}")
    with full, atomic(target) as temporary:
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    assert target.read_text() == "old"
    assert parts(tmp_path) == []


def test_a_full_disk_is_recognised_where_the_writer_hides_it(tmp_path, monkeypatch):
    # torch.save and safetensors report a failed write as a plain RuntimeError.
    usage = files.shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="no space left"), atomic(tmp_path / "x"):
        raise RuntimeError("file write failed")


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(KeyError), atomic(tmp_path / "x"):
        raise KeyError("x")
    with pytest.raises(UserError, match="^as it is$"), atomic(tmp_path / "x"):
        raise UserError("as it is")
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "x"):
        raise KeyboardInterrupt


def test_stages_are_done_once_they_say_so(tmp_path):
    opened = Record.open(tmp_path, Run())
    assert not opened.done("train")
    with pytest.raises(UserError, match=r"'train' .* is not done"):
        opened.facts("train")
    opened.finish("train", steps=3, files=["a"])
    again = Record.open(tmp_path, Run())
    assert again.done("train")
    assert again.facts("train") == {"steps": 3, "files": ["a"]}
    assert not again.done("generate")


def test_reopening_with_other_labels_is_the_same_run(tmp_path):
    Record.open(tmp_path, Run()).finish("train")
    relabelled = Run(CONFIG | {"study": "other", "wandb": {"mode": "disabled"}})
    assert Record.open(tmp_path, relabelled).done("train")


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    Record.open(tmp_path, Run())
    other = Run(CONFIG | {"train": {"lr": 2e-3, "betas": [0.9, 0.99]}})
    with pytest.raises(UserError, match=r"there train\.lr is 0\.001, here 0\.002; delete"):
        Record.open(tmp_path, other)


def test_a_key_that_one_side_lacks_is_refused_too(tmp_path):
    Record.open(tmp_path, Run())
    with pytest.raises(UserError, match=r"there new is missing, here None"):
        Record.open(tmp_path, Run(CONFIG | {"new": None}))


def test_a_folder_of_other_things_is_refused_and_untouched(tmp_path):
    foreign = tmp_path / Run().folder_name / "thesis.txt"
    foreign.parent.mkdir()
    foreign.write_text("years of work")
    with pytest.raises(UserError, match="not a run"):
        Record.open(tmp_path, Run())
    assert [p.name for p in foreign.parent.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["", "- 1\n", "a: [\n", "\0\1"])
def test_a_damaged_config_is_refused_unless_a_stage_is_done(tmp_path, capsys, content):
    opened = Record.open(tmp_path, Run())
    file = opened.path / "config.yaml"
    whole = file.read_text()
    file.write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml"):
        Record.open(tmp_path, Run())
    opened.finish("data")
    Record.open(tmp_path, Run())
    assert "config.yaml was damaged" in capsys.readouterr().out
    assert file.read_text() == whole


def test_a_folder_left_empty_by_a_kill_is_taken_over(tmp_path):
    (tmp_path / Run().folder_name / ".part-abc").mkdir(parents=True)
    opened = Record.open(tmp_path, Run())
    assert (opened.path / "config.yaml").is_file()
    assert parts(opened.path) == []


@given(configs)
def test_the_hash_ignores_labels_and_the_order_of_keys(config):
    labelled = dict(reversed(config.items())) | {"name": "x", "study": "y", "wandb": {"mode": "z"}}
    assert digest(labelled) == digest(config)
    assert len(digest(config)) == 8
    assert identity(labelled) == config


@given(configs, keys, scalars, scalars)
def test_the_hash_sees_every_other_change(config, key, value, other):
    if json.dumps(value) != json.dumps(other):
        assert digest(config | {key: value}) != digest(config | {key: other})
        section = {"train": {key: value}}, {"train": {key: other}}
        assert digest(section[0]) != digest(section[1])
