"""Datasets in the TOML of sd-scripts: carried over, listed, or refused."""

import textwrap
from pathlib import Path

import pytest

from lyco_lab.data.buckets import Sizing
from lyco_lab.data.captions import Captions
from lyco_lab.data.index import build
from lyco_lab.data.memo import Memo
from lyco_lab.data.sdscripts import DATASET, INERT, SUBSET, read
from lyco_lab.errors import UserError
from tests.data import pictures


@pytest.fixture
def toml(tmp_path):
    def load(text):
        file = tmp_path / "dataset.toml"
        file.write_text(textwrap.dedent(text))
        return read(file)

    return load


PAPER = """
    [general]
    enable_bucket = true
    caption_extension = ".txt"
    shuffle_caption = true
    keep_tokens = 1
    bucket_reso_steps = 64
    bucket_no_upscale = true
    min_bucket_reso = 320
    max_bucket_reso = 960
    color_aug = false
    caption_dropout_every_n_epochs = 0

    [[datasets]]
    resolution = 512
    batch_size = 8
    keep_tokens = 2

      [[datasets.subsets]]
      image_dir = "data/dog"
      num_repeats = 17
      class_tokens = "sks dog"
      caption_dropout_rate = 0.05

      [[datasets.subsets]]
      image_dir = "data/class"
      is_reg = true
      flip_aug = true
      keep_tokens = 3

    [[datasets]]
    resolution = [768, 512]
    batch_size = 8

      [[datasets.subsets]]
      image_dir = "data/wide"
      alpha_mask = true
"""


def test_all_levels_are_read_and_the_innermost_counts(toml):
    found = toml(PAPER)
    dog, prior, wide = found.sources
    assert (found.batch_size, found.dropped) == (8, ())
    assert dog.sizing == Sizing(512, 512, (320, 960, 64), upscale=False)
    assert wide.sizing == Sizing(768, 512, (320, 960, 64), upscale=False)
    assert (dog.folder, dog.repeats, dog.class_tokens) == (Path("data/dog"), 17, "sks dog")
    assert dog.captions == Captions(shuffle=True, keep_tags=2, dropout=0.05)
    assert prior.captions == Captions(shuffle=True, keep_tags=3)
    assert wide.captions.keep_tags == 1
    assert [s.prior for s in found.sources] == [False, True, False]
    assert [s.flip for s in found.sources] == [False, True, False]
    assert [s.masks for s in found.sources] == [None, None, "alpha"]
    assert {s.extensions for s in found.sources} == {(".txt",)}
    assert not any(s.recursive or s.numbered for s in found.sources)


def test_their_defaults(toml):
    found = toml('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "x"')
    (source,) = found.sources
    assert found.batch_size is None
    assert source.sizing == Sizing(512, 512, None, upscale=True)
    assert source.repeats == 1 and source.extensions == (".caption",)
    assert source.captions == Captions()


def one(**values):
    body = "\n".join(f"{key} = {value}" for key, value in values.items())
    return f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "x"\n{body}'


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("color_aug", "true"),
        ("random_crop", "true"),
        ("keep_tokens_separator", '"|||"'),
        ("metadata_file", '"m.json"'),
        ("face_crop_aug_range", "[1.0, 2.0]"),
        ("token_warmup_step", "100"),
        ("network_multiplier", "0.5"),
    ],
)
def test_what_cannot_be_carried_is_listed_unless_it_asks_for_nothing(toml, key, value):
    (said,) = toml(one(**{key: value})).dropped
    assert said.startswith(f"[[datasets]] 1, subset 1: {key} = ")


def test_values_that_ask_for_nothing_are_passed_over(toml):
    assert toml(one(color_aug="false", token_warmup_step=0, network_multiplier=1.0)).dropped == ()


def test_a_prefix_that_would_be_shuffled_there_is_listed(toml):
    assert toml(one(caption_prefix='"best"')).sources[0].captions.prefix == "best "
    (said,) = toml(one(caption_prefix='"best"', shuffle_caption="true")).dropped
    assert "caption_prefix" in said


def test_every_key_is_known_once():
    assert not (DATASET.keys() | SUBSET.keys()) & INERT.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[datasets", "not valid TOML"),
        ("", r"has no \[\[datasets\]\]"),
        ("[generall]\n", r"unknown key 'generall' \(did you mean 'general'"),
        ("[[datasets]]\nresolution = 512", "has no .*subsets.* with an image_dir"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2", "needs an image_dir"),
        (one(num_repeat=2), r"unknown key 'num_repeat' \(did you mean 'num_repeats'"),
        (one(num_repeats='"2"'), "num_repeats is '2', needs a value like 1"),
        (one(num_repeats="true"), "num_repeats is True, needs a value like 1"),
        (one(shuffle_caption=1), "shuffle_caption is 1, needs a value like False"),
        (one(caption_dropout_rate=1.5), r"caption_dropout_rate is 1.5, needs a number in \[0, 1\]"),
        (one(num_repeats=-1), "num_repeats is -1, needs a number from 0 to 10,000"),
        (one(num_repeats=9 * 10**18), "subset 1: num_repeats is 9000000000000000000, needs a"),
        (one(num_repeats="1" + "0" * 5000), "not valid TOML"),
        (one(keep_tokens=10**9), "keep_tokens is 1000000000, needs a number from 0"),
        (one(caption_prefix='"\\u0000"'), "caption_prefix is .*, needs text"),
        ("x = " + "[" * 20000, "not valid TOML"),
        ("[general]\nbatch_size = 1000000000\n" + one(), "batch_size is 1000000000, needs a"),
        ("[general]\nresolution = [512, 1000000000]\n" + one(), "resolution is 1000000000, needs"),
        (one(keep_tokens=2), "neither shuffled nor dropped"),
        (one(resolution=512), "resolution belongs one level up"),
        ("[general]\nimage_dir = 'x'\n" + one(), "image_dir belongs in a"),
        ("[general]\nmin_bucket_reso = 320\n" + one(), "enable_bucket is false"),
        ("[general]\nresolution = 'big'\n" + one(), "resolution is 'big'"),
        ("[general]\nresolution = [1, 2, 3]\n" + one(), "resolution is"),
        ("[general]\nresolution = 500\n" + one(), "subset|images of 500 x 500"),
        (
            "[general]\nenable_bucket = true\nmin_bucket_reso = 300\n" + one(),
            r"buckets are \[300, 1024, 64\]",
        ),
        (
            "[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = 'x'\n"
            "[[datasets]]\nbatch_size = 3\n[[datasets.subsets]]\nimage_dir = 'y'",
            r"batch sizes \[2, 3\]",
        ),
    ],
)
def test_files_that_are_refused(toml, text, message):
    with pytest.raises(UserError, match=message):
        toml(text)


def test_a_mark_that_editors_on_windows_put_in_front_is_no_part_of_a_file(toml, tmp_path):
    plain = toml(one(num_repeats=3))
    marked = b"\xef\xbb\xbf" + (tmp_path / "dataset.toml").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "marked.toml").write_bytes(marked)
    assert read(tmp_path / "marked.toml") == plain


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self"])
def test_a_device_or_folder_is_no_file(path):
    with pytest.raises(UserError, match=f"cannot read {path}"):
        read(Path(path))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*x\.toml"):
        read(tmp_path / "x.toml")


def test_a_caption_is_the_first_line_as_in_sd_scripts(toml, tmp_path):
    (tmp_path / "in").mkdir()
    pictures.image(tmp_path / "in" / "0.png")
    (tmp_path / "in" / "0.caption").write_text("one\ntwo\n")
    text = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{tmp_path / "in"}"'
    index = build(toml(text).sources, Memo())
    assert index.captions() == ["one"]
    assert any("several lines, of which the first is used" in line for line in index.report())
