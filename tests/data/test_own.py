"""From a run's settings to samples: what is left out, lent, limited and said."""

import csv

import numpy as np
import pytest

from lyco_lab.config import Data, Run, Train
from lyco_lab.data import own, scan, stage
from lyco_lab.data.memo import Memo
from lyco_lab.errors import UserError
from lyco_lab.record import Record
from tests.data import pictures


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    monkeypatch.setattr(scan, "SETTLED_NS", -(10**12))


def samples(tmp_path, side=64, batch_size=4, **data):
    where = {} if "toml" in data else {"folder": str(tmp_path / "in")}
    return own.samples_of(Data(**where, **data), batch_size, side, Memo(), tmp_path / "t.csv")


def names(found):
    return [found.index.file(int(row)).name for row in found.rows_E]


def test_bad_files_end_the_run_unless_they_may_be_dropped(tmp_path):
    root = pictures.folder(tmp_path / "in")
    (root / "1.png").write_bytes(b"")
    message = r"1 of the 3 images of .*in cannot be used, as .*1.png \(empty file.*data.bad_files"
    with pytest.raises(UserError, match=message) as caught:
        samples(tmp_path)
    assert "\n" not in str(caught.value) and "t.csv" in str(caught.value)
    assert names(samples(tmp_path, bad_files="drop")) == ["0.png", "2.png"]
    with open(tmp_path / "t.csv", newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["used", "used", "dropped"]


@pytest.mark.parametrize("balance", ["repeats", "classes"])
@pytest.mark.parametrize("what", ["nothing", "notes", "bad"])
def test_a_folder_without_images(tmp_path, what, balance):
    (tmp_path / "in").mkdir()
    if what == "notes":
        (tmp_path / "in" / "notes.md").write_text("x")
    if what == "bad":
        (tmp_path / "in" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="no images in .*in: it needs .png"):
        samples(tmp_path, bad_files="drop", balance=balance)


def test_images_too_small_are_not_enlarged_unless_asked(tmp_path):
    pictures.folder(tmp_path / "in", ((64, 64), (63, 200)))
    with pytest.raises(UserError, match="too small: 63 x 200 pixels, and data.upscale is false"):
        samples(tmp_path)
    assert names(samples(tmp_path, bad_files="drop")) == ["0.png"]
    assert names(samples(tmp_path, upscale=True)) == ["0.png", "1.png"]


def test_a_pixel_that_cannot_be_read_keeps_sizes_in_step(tmp_path):
    root = pictures.folder(tmp_path / "in", ((64, 64), (96, 64), (64, 96)))
    data = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(data[:200] + bytes(50) + data[250:])
    found = samples(tmp_path, bad_files="drop", buckets=(32, 96, 8))
    assert names(found) == ["0.png", "2.png"]
    assert found.sizes_E2.tolist() == [[64, 64], [48, 80]]
    assert len(found.digests) == 2


def test_limit_counts_images_that_are_not_prior(tmp_path):
    pictures.folder(tmp_path / "in")
    pictures.folder(tmp_path / "prior")
    found = samples(tmp_path, limit=2, prior=str(tmp_path / "prior"))
    assert found.prior_E.tolist() == [False, False, True, True, True]


def test_repeats_and_balance(tmp_path):
    pictures.folder(tmp_path / "in" / "3_a")
    pictures.folder(tmp_path / "in" / "b", ((64, 64),))
    assert samples(tmp_path).index.repeats_N.tolist() == [3, 3, 3, 1]
    assert samples(tmp_path, repeats=5).index.repeats_N.tolist() == [5] * 4
    assert samples(tmp_path, balance="classes").index.repeats_N.tolist() == [1, 1, 1, 3]


def test_prior_images_are_lent_to_sizes_without(tmp_path):
    pictures.folder(tmp_path / "in", ((64, 64), (96, 64), (64, 96)))
    pictures.folder(tmp_path / "prior", ((64, 64), (120, 100), (100, 110)))
    found = samples(
        tmp_path, buckets=(32, 96, 8), prior=str(tmp_path / "prior"), prior_share=0.5, repeats=2
    )
    wanted = {tuple(size) for size in found.sizes_E2[~found.prior_E].tolist()}
    assert {tuple(size) for size in found.sizes_E2[found.prior_E].tolist()} >= wanted
    order = found.order(4, 0)
    for step in range(6):
        shown = order.indices(step).numpy()
        assert found.prior_E[shown].sum() == 2
        assert len({tuple(size) for size in found.sizes_E2[shown].tolist()}) == 1
    for entry in np.flatnonzero(found.prior_E):
        row = found.rows_E[entry]
        size = found.sizes_E2[entry]
        assert size[0] <= found.index.width_N[row] and size[1] <= found.index.height_N[row]


def test_as_many_are_lent_as_have_places_and_those_that_show_most(tmp_path):
    pictures.folder(tmp_path / "in", ((96, 40),) * 3)
    pictures.folder(tmp_path / "prior", ((100, 100), (120, 60), (110, 64), (300, 100), (64, 64)))
    found = samples(
        tmp_path, buckets=(32, 96, 8), prior=str(tmp_path / "prior"), prior_share=0.25, repeats=2
    )
    size = found.sizes_E2[0].tolist()
    lent = [
        found.index.file(found.rows_E[e]).name
        for e in np.flatnonzero(found.prior_E)
        if found.sizes_E2[e].tolist() == size
    ]
    # 6 samples of ours are three quarters: 2 places are theirs.
    aspect = size[0] / size[1]
    shapes = {"0.png": 1, "1.png": 2, "2.png": 110 / 64, "3.png": 3}
    wide = sorted(shapes, key=lambda n: abs(np.log(shapes[n] / aspect)))
    assert lent == wide[:2]


def test_a_dataset_s_columns_are_those_of_its_items(tmp_path):
    pictures.folder(tmp_path / "in" / "3_a")
    pictures.folder(tmp_path / "prior")
    found = own.dataset_of(
        samples(tmp_path, prior=str(tmp_path / "prior"), suffix="!"), tmp_path, tmp_path
    )
    assert len(found.items) == 3
    assert found.captions == [item.caption for item in found.items]
    assert found.captions == [f"sks dog, tag {i}, outside!" for i in range(3)]
    assert found.repeats == tuple(item.repeats for item in found.items) == (3, 3, 3)
    assert found.samples_per_epoch == 9
    assert found.items[:2] == [found.items[0], found.items[1]]
    assert [item.file.name for item in found.items] == ["0.png", "1.png", "2.png"]
    assert (found.trigger, found.class_word) == ("sks", "dog")
    with pytest.raises(IndexError):
        found.items[3]


def test_a_trigger_of_the_run_is_the_dataset_s(tmp_path):
    pictures.folder(tmp_path / "in")
    for text in (tmp_path / "in").glob("*.txt"):
        text.write_text(f"a dog, {text.stem}")
    found = own.dataset_of(samples(tmp_path, trigger="zwx"), tmp_path / "in", tmp_path)
    assert found.captions == [f"zwx a dog, {i}" for i in range(3)]
    assert (found.trigger, found.class_word) == ("zwx", "a dog")
    with pytest.raises(UserError, match="no trigger: its caption lacks 'zwx'"):
        samples(tmp_path, trigger="zwx", trigger_rule="keep")


TOML = """
[general]
caption_extension = ".txt"
{general}
[[datasets]]
resolution = 64
batch_size = 4
[[datasets.subsets]]
image_dir = "{folder}"
{subset}
"""


@pytest.fixture
def toml(tmp_path):
    pictures.folder(tmp_path / "in")

    def write(general="", subset=""):
        file = tmp_path / "data.toml"
        file.write_text(TOML.format(folder=tmp_path / "in", general=general, subset=subset))
        return str(file)

    return write


def test_a_toml_says_where_and_how(tmp_path, toml):
    found = samples(tmp_path, toml=toml(subset="num_repeats = 3"))
    assert found.index.repeats_N.tolist() == [3, 3, 3]


def test_what_a_toml_asks_and_cannot_get_is_an_error(tmp_path, toml):
    with pytest.raises(UserError, match=r"\[general\]: color_aug = True; .*random_crop = True"):
        samples(tmp_path, toml=toml("color_aug = true", "random_crop = true"))
    with pytest.raises(UserError, match="train.batch_size is 2, but .* says batch_size = 4"):
        samples(tmp_path, toml=toml(), batch_size=2)
    with pytest.raises(UserError, match="data.prior_weight is 0.5, but no subset .* is_reg"):
        samples(tmp_path, toml=toml(), prior_weight=0.5)


def test_the_stage_says_what_it_found(tmp_path, capsys):
    pictures.folder(tmp_path / "in" / "a", ((64, 64), (300, 64)))
    pictures.folder(tmp_path / "in" / "5_b", ((64, 64),))
    (tmp_path / "in" / "a" / "0.txt").unlink()
    (tmp_path / "in" / "notes.md").write_text("x")
    data = Data(folder=str(tmp_path / "in"), bad_files="drop", shuffle_tags=True)
    run = Run(name="r", study="s", data=data, train=Train(steps=30, batch_size=2, warmup_steps=1))
    record = Record.open(tmp_path / "runs", run)
    stage.prepare(run, record)
    said = capsys.readouterr().out
    for words in (
        "2 images used, 1 dropped",
        "dropped, no caption: 1 (the first: ",
        "not images: 1 .md files",
        "5_b: 5 repeats, as the folder's name says",
        "sizes: 64 x 64: 2",
        "1 images lose more than a third to cutting; most, 79%",
        "samples per epoch: b 5, a 1",
        "2 images, 6 samples per epoch with repeats; 2 of them per step (batch 2)",
        "; 3 steps per epoch; 30 steps = 10 epochs",
        "tags are drawn anew in each step",
    ):
        assert words in said
    lines = [line for line in said.splitlines() if not line.startswith("images checked")]
    assert all(line.startswith("r: ") for line in lines)
    assert (record.path / "images.csv").is_file()
    assert record.facts("data")["dropped_images"] == 1
    seen = stage.look(run)
    assert seen[:2] == (2, 6)
    assert seen.report[0] == f"{tmp_path / 'in'}: 2 images used, 1 dropped"
    assert len(stage.dataset(run, record).items) == 2


def test_a_toml_that_changes_later_is_refused(tmp_path, toml):
    def started(**words):
        run = Run(name="r", study="s", data=Data(toml=toml(**words)))
        record = Record.open(tmp_path / "runs", run)
        stage.prepare(run, record)
        return stage.dataset(run, record)

    assert len(started(general="shuffle_caption = true").items) == 3
    with pytest.raises(UserError, match="changed since this run began"):
        started(general="flip_aug = true")


def test_a_caption_that_changes_later_is_refused(tmp_path):
    root = pictures.folder(tmp_path / "in")
    run = Run(name="r", study="s", data=Data(folder=str(root)))
    record = Record.open(tmp_path / "runs", run)
    stage.prepare(run, record)
    (root / "0.txt").write_text("something else")
    with pytest.raises(UserError, match="images or captions in .* changed since this run began"):
        stage.dataset(run, record)
