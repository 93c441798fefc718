"""The data stage: a concept is written once, a user's folder checked, and neither may change."""

import shutil

import pytest

from lyco_lab.config import Data, Run
from lyco_lab.data.stage import dataset, prepare
from lyco_lab.errors import UserError
from lyco_lab.miniature.concepts import CONCEPTS
from lyco_lab.record import Record


def opened(tmp_path, **data):
    run = Run(name="r", study="s", data=Data(**data))
    return run, Record.open(tmp_path / "runs", run)


def test_a_concept_is_written_into_the_run(tmp_path):
    run, record = opened(tmp_path, concept="robo")
    prepare(run, record)
    concept = CONCEPTS["robo"]
    assert record.facts("data")["images"] == concept.images
    assert record.facts("data")["samples_per_epoch"] == concept.images * concept.repeats
    found = dataset(run, record)
    assert found.folder.is_relative_to(record.path)
    assert (found.trigger, found.class_word) == (concept.trigger, concept.class_word)


def test_a_folder_stays_where_it_is(tmp_path, tiny_concept):
    run, record = opened(tmp_path, folder=str(tiny_concept), limit=4)
    prepare(run, record)
    assert len(dataset(run, record).items) == 4
    assert not (record.path / "data").exists()


def test_a_bad_image_stops_the_stage(tmp_path, tiny_concept):
    folder = shutil.copytree(tiny_concept, tmp_path / "bad")
    (folder / "0005.png").write_bytes(b"")
    run, record = opened(tmp_path, folder=str(folder))
    with pytest.raises(UserError, match="1 of the 6 images of .*0005.png .empty file"):
        prepare(run, record)
    assert not record.done("data")


def change_captions(folder):
    for path in [*folder.glob("*.txt"), folder / "manifest.jsonl"]:
        path.write_text(path.read_text().replace("red", "orange"))


def lose_an_image(folder):
    """With all that speaks of it."""
    (folder / "0003.png").unlink()
    (folder / "0003.txt").unlink()
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_text("".join(x for x in lines if "0003.png" not in x))


@pytest.mark.parametrize("change", [change_captions, lose_an_image])
@pytest.mark.parametrize("advice", ["put them back", "delete"])
def test_images_that_change_later_are_refused_and_the_advice_helps(
    tmp_path, tiny_concept, change, advice
):
    folder = shutil.copytree(tiny_concept, tmp_path / "changing")
    run, record = opened(tmp_path, folder=str(folder))
    prepare(run, record)
    change(folder)
    said = "images or captions in .* changed since this run began: put them back, or delete "
    with pytest.raises(UserError, match=said + str(record.path)):
        dataset(run, record)
    if advice == "put them back":
        shutil.copytree(tiny_concept, folder, dirs_exist_ok=True)
    else:
        shutil.rmtree(record.path)
        record = Record.open(tmp_path / "runs", run)
        prepare(run, record)
    kept = advice == "put them back" or change is change_captions
    assert len(dataset(run, record).items) == (6 if kept else 5)


def test_an_unknown_concept_names_the_nearest(tmp_path):
    run, record = opened(tmp_path, concept="octa")
    with pytest.raises(UserError, match="did you mean 'octo'"):
        prepare(run, record)
