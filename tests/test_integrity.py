"""Outputs of done stages: whatever happens to one is noticed, and mended where it came from."""

import json
import random

import pytest

from lyco_lab import integrity
from lyco_lab.adopt import adopt
from lyco_lab.errors import UserError
from lyco_lab.integrity import damage, mend, records, shared_with
from lyco_lab.readers import Damaged
from lyco_lab.record import Record, digest

CONFIG = {"name": "lora", "seed": 0}
FILES = {
    "data": ("data/0000.png", "data/manifest.jsonl", "images.csv"),
    "train": (
        "adapter.safetensors", "embeddings/word.safetensors", "train/metrics.csv",
        "train/checkpoints/step4.ckpt", "train/samples/step4.png",
    ),
    "generate": ("generate/alter/0000.png", "generate/images.parquet"),
    "evaluate": ("evaluate/images.parquet", "evaluate/metrics.json"),
}  # fmt: skip
SPARE = {"train/checkpoints/step4.ckpt", "train/samples/step4.png"}
BASE_STAGE = "base/kael-1/generate"


class Run:
    folder_name = f"lora-{digest(CONFIG)}"

    def to_dict(self):
        return CONFIG


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


HARMS = {
    "flip": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "delete": lambda file: file.unlink(),
}


def write(record, names):
    for name in names:
        (record.path / name).parent.mkdir(parents=True, exist_ok=True)
        (record.path / name).write_text(f"what is in {name}")


@pytest.fixture
def finished(tmp_path):
    base = Record(tmp_path / "base" / "kael-1")
    write(base, ["alter/0000.png"])
    base.finish("generate", outputs=[base.path / "alter" / "0000.png"])
    record = Record.open(tmp_path, Run())
    for stage, names in FILES.items():
        write(record, names)
        reads = [BASE_STAGE] if stage == "evaluate" else []
        beside = [BASE_STAGE] if stage == "generate" else []
        record.finish(stage, reads=reads, beside=beside, number=3)
    return record


def settled(record):
    return [stage for stage in FILES if record.settled(stage)]


def test_what_nobody_touched_is_whole(finished, tmp_path):
    assert settled(finished) == list(FILES)
    assert mend(finished) == [] == list(damage(tmp_path, []))
    assert finished.require("train") == {"number": 3}
    for stage, names in FILES.items():
        assert set(finished.mark(stage).outputs) == set(names)


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
@pytest.mark.parametrize("stage", FILES)
def test_every_damaged_output_is_noticed_and_mended_at_its_stage(finished, tmp_path, stage, harm):
    for name in FILES[stage]:
        file = finished.path / name
        whole = file.read_bytes()
        harm(file)
        assert any(str(file) in line for line in damage(tmp_path, []))
        with pytest.raises(Damaged, match=f"{file.name} is damaged"):
            finished.output(stage, name)
        if name in SPARE:
            finished.require(stage)
        else:
            with pytest.raises(Damaged, match=f"stage '{stage}' left it; run the study again"):
                finished.require(stage)
        said = mend(finished)
        assert len(said) == 1 and str(file) in said[0]
        assert not file.exists()
        if name in SPARE:
            assert settled(finished) == list(FILES)
            continue
        assert not finished.done(stage)
        write(finished, FILES[stage])
        finished.finish(stage, beside=[BASE_STAGE] * (stage == "generate"), number=3)
        assert file.read_bytes() == whole
        assert settled(finished) == list(FILES)


@pytest.mark.parametrize("stage", ["data", "train", "generate", BASE_STAGE])
def test_a_lost_mark_is_noticed_by_those_that_name_it(finished, tmp_path, stage):
    folder, _, name = stage.rpartition("/")
    file = tmp_path / (folder or finished.path.name) / "done" / f"{name}.json"
    file.unlink()
    (line,) = damage(tmp_path, [])
    assert line.startswith(f"{file} is missing")


def test_a_folder_in_the_place_of_an_output_is_not_deleted(finished):
    file = finished.path / "adapter.safetensors"
    file.unlink()
    (file / "thesis").mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder: move it away"):
        mend(finished)
    assert (file / "thesis").is_dir()


def test_rows_of_training_come_from_training_alone(finished):
    flip(finished.path / "train" / "metrics.csv")
    mend(finished)
    assert not list((finished.path / "train" / "checkpoints").iterdir())


@pytest.mark.parametrize("stage", ["train", "generate", "evaluate"])
def test_an_output_that_comes_out_otherwise_makes_later_stages_stale(finished, stage):
    earlier = list(FILES)[: list(FILES).index(stage)]
    name = {"train": "adapter.safetensors", "generate": "generate/alter/0000.png"}.get(stage)
    if name is not None:
        (finished.path / name).write_text("another result")
        finished.finish(stage, beside=[BASE_STAGE] * (stage == "generate"), number=3)
        stale = "generate" if stage == "train" else "evaluate"
        assert settled(finished)[: len(earlier) + 1] == [*earlier, stage]
        assert not finished.settled(stale)
        outputs = [finished.path / each for each in FILES[stale]]
        assert finished.pending(stale)
        assert not any(file.exists() for file in outputs)
    base = Record(finished.path.parent / "base" / "kael-1")
    base.undo("generate")
    assert not finished.settled("evaluate")


def test_learning_curves_and_lists_make_nothing_stale(finished):
    (finished.path / "train" / "metrics.csv").write_text("other numbers")
    finished.finish("train", number=3)
    (finished.path / "images.csv").write_text("other places")
    finished.finish("data", number=3)
    assert settled(finished) == list(FILES)


def test_marks_believe_no_byte_of_themselves(finished, tmp_path):
    rng = random.Random(0)
    file = finished.mark_file("train")
    whole = file.read_bytes()
    for number in range(200):
        content = bytearray(whole)
        place = rng.randrange(len(content))
        if number % 2:
            content[place] ^= 1 << rng.randrange(8)
        else:
            content = content[:place]
        file.write_bytes(content)
        try:
            same = finished.mark("train")
        except Damaged:
            assert not finished.done("train")
            assert list(damage(tmp_path, []))
        else:  # a blank between two words
            file.write_bytes(whole)
            assert same == finished.mark("train")
    file.write_bytes(whole[:-9])
    assert mend(finished) == [f"{file} is damaged: the stage train is checked and finished again"]
    assert not file.exists()


def test_a_configuration_that_its_folder_is_not_named_by_is_damage(finished, tmp_path):
    file = finished.path / "config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    assert list(damage(tmp_path, [])) == [f"{finished.path / 'config.yaml'} is missing or damaged"]
    Record.open(tmp_path, Run())
    assert list(damage(tmp_path, [])) == []


def test_runs_are_named_by_folder_by_name_and_by_pattern(finished, tmp_path):
    shared = Record(tmp_path / "base" / "kael-1")
    assert shared_with(finished) == [shared]
    for name in ("lora", finished.path.name, str(finished.path), "lor*"):
        assert records(tmp_path, [name]) == [finished, shared]
    with pytest.raises(UserError, match=r"'lorra' is no run in .* \(did you mean 'lora'"):
        records(tmp_path, ["lorra"])


def test_a_mark_of_an_earlier_version_is_adopted_when_asked(finished, tmp_path):
    for stage in FILES:
        facts = {"base": "kael-1"} if stage == "generate" else {"number": 4}
        facts |= {"references": "x"} if stage == "evaluate" else {}
        finished.mark_file(stage).write_text(json.dumps(facts))
    with pytest.raises(UserError, match="lyco-lab check --adopt"):
        mend(finished)
    said = list(adopt(tmp_path, []))
    assert [line.split()[3] for line in said] == list(FILES)
    assert settled(finished) == ["data", "train", "generate"]
    assert finished.facts("train") == {"number": 4}


def test_the_trial_would_see_a_reader_that_checks_nothing(finished, monkeypatch):
    monkeypatch.setattr("lyco_lab.record._fault_of", lambda path, noted: None)
    flip(finished.path / "adapter.safetensors")
    assert finished.require("train") and integrity.mend(finished) == []
