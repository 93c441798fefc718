"""Reading a folder of images: both layouts, and everything that can be wrong with one."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from lyco_lab.data.folder import read, read_image
from lyco_lab.errors import UserError


@pytest.fixture
def folder(tiny_concept, tmp_path):
    """A copy of the concept that may be changed."""
    return shutil.copytree(tiny_concept, tmp_path / "concept")


@pytest.fixture
def plain(folder):
    """The same without a manifest."""
    (folder / "manifest.jsonl").unlink()
    return folder


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def rewrite(folder, entries):
    (folder / "manifest.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))


def test_a_manifest_gives_captions_repeats_and_attributes(folder):
    dataset = read(folder)
    assert [item.file.name for item in dataset.items] == [f"{i:04d}.png" for i in range(6)]
    assert dataset.captions[1] == "sks circle, green"
    assert dataset.items[1].attributes == {"colour": "green"}
    assert dataset.items[5].subclass == "big"
    assert (dataset.trigger, dataset.class_word, dataset.category) == ("sks", "circle", "toy")
    assert dataset.repeats == (2,) * 6 and dataset.samples_per_epoch == 12


def test_without_a_manifest_captions_lie_beside_the_images(plain):
    dataset = read(plain)
    assert dataset.captions[:3] == [f"sks circle, {c}" for c in ("red", "green", "blue")]
    assert (dataset.trigger, dataset.class_word) == ("sks", "circle")
    assert dataset.repeats == (1,) * 6


def test_captions_that_disagree_name_no_trigger(plain):
    (plain / "0000.txt").write_text("a circle")
    assert (read(plain).trigger, read(plain).class_word) == ("", "")


def test_repeats_and_limit_override(folder):
    dataset = read(folder, repeats=5, limit=2)
    assert dataset.repeats == (5, 5)
    assert [item.file.name for item in dataset.items] == ["0000.png", "0001.png"]


def test_images_are_read_as_they_are(folder):
    images = read(folder).images(64)
    assert images.shape == (6, 64, 64, 3) and images.dtype == np.uint8
    assert (images[0] == np.asarray(Image.open(folder / "0000.png"))).all()


def test_other_sizes_are_cut_to_the_middle_square(plain):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    Image.fromarray(wide).save(plain / "0000.png")
    assert read(plain).images(64)[0].min() > 150  # the dark sides are gone


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(read_image(tmp_path / "clear.png")) == 255).all()


def test_greyscale_and_palette_images_are_read(tmp_path):
    Image.new("L", (4, 4), 100).save(tmp_path / "grey.png")
    Image.new("RGB", (4, 4), (255, 0, 0)).quantize(2).save(tmp_path / "palette.png")
    assert np.asarray(read_image(tmp_path / "grey.png")).tolist() == [[[100] * 3] * 4] * 4
    assert np.asarray(read_image(tmp_path / "palette.png"))[0, 0].tolist() == [255, 0, 0]


def test_the_digest_sees_pixels_captions_and_repeats_but_not_the_place(folder, tmp_path):
    before = read(folder).digest()
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert read(moved).digest() == before
    assert read(folder, repeats=3).digest() != before
    assert read(folder, limit=5).digest() != before
    rewrite(folder, [e | {"attributes": {}} for e in manifest(folder)])
    assert read(folder).digest() == before
    Image.new("RGB", (64, 64)).save(moved / "0003.png")
    assert read(moved).digest() != before


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="the folder of images .*nowhere does not exist"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("with_manifest", [True, False])
def test_no_images(tmp_path, with_manifest):
    (tmp_path / "notes.txt").write_text("nothing here")
    if with_manifest:
        (tmp_path / "manifest.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no images in .*: it needs .png"):
        read(tmp_path)


def test_none_left_after_filters(folder):
    with pytest.raises(UserError, match="0 of the 6 images in .* are left after data.limit=0"):
        read(folder, limit=0)
    rewrite(folder, [e | {"repeats": 0} for e in manifest(folder)])
    with pytest.raises(UserError, match="0 of the 6 images"):
        read(folder)


def test_missing_caption_file(plain):
    (plain / "0002.txt").unlink()
    with pytest.raises(UserError, match="0002.png in .* has no caption: write one in 0002.txt"):
        read(plain)


def test_empty_caption_file(plain):
    (plain / "0002.txt").write_text(" \n")
    with pytest.raises(UserError, match="caption 0002.txt in .* is empty"):
        read(plain)


def test_a_caption_that_is_no_text(plain):
    (plain / "0002.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="0002.txt is not text in UTF-8"):
        read(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": " "}, "line 3: needs a caption that is not empty, got ' '"),
        ({"caption": None}, "line 3: needs a caption that is not empty, got None"),
        ({"file": "9999.png"}, "line 3: names the image '9999.png', which does not exist"),
        ({"repeats": -1}, "line 3: repeats needs a whole number >= 0, got -1"),
        ({"repeats": "2"}, "line 3: repeats needs a whole number >= 0, got '2'"),
        ({"captoin": "x"}, r"line 3: unknown key 'captoin' \(did you mean 'caption'"),
        ({"caption": "other"}, "line 3: its caption is 'other', but 0002.txt says"),
    ],
)
def test_bad_manifest_entries(folder, change, message):
    entries = manifest(folder)
    entries[2] |= change
    if change.get("file"):
        (folder / "0002.png").unlink()
    rewrite(folder, entries)
    with pytest.raises(UserError, match=f"manifest.jsonl, {message}"):
        read(folder)


@pytest.mark.parametrize(("line", "message"), [("{", "not JSON"), ("3", "needs an object with")])
def test_bad_manifest_lines(folder, line, message):
    (folder / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=f"line 1: {message}"):
        read(folder)


def test_images_the_manifest_does_not_list(folder):
    rewrite(folder, manifest(folder)[:2])
    with pytest.raises(
        UserError, match="says nothing of 0002.png, 0003.png, 0004.png and others: add a line"
    ):
        read(folder)


def test_unreadable_image(folder):
    (folder / "0004.png").write_bytes((folder / "0004.png").read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read the image .*0004.png: .*; replace or remove"):
        read(folder).images(64)
    (folder / "0004.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read the image .*0004.png"):
        read(folder).images(64)


def test_an_image_that_vanishes_after_the_folder_was_read(folder):
    dataset = read(folder)
    (folder / "0004.png").unlink()
    with pytest.raises(UserError, match="the image .*0004.png does not exist"):
        dataset.images(64)


def plainly(file):
    """`read_image` in as many copies as it takes."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "P, one colour", "P, table"])
@pytest.mark.parametrize("form", ["png", "webp"])
def test_few_copies_give_the_same_bits(tmp_path, mode, orientation, form):
    rng, kind = np.random.default_rng(0), mode.partition(",")[0]
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image = Image.fromarray(rng.integers(0, 256, (600, 30, 4), dtype=np.uint8)).convert(kind)
    more = {"P, one colour": {"transparency": 3}, "P, table": {"transparency": bytes(range(256))}}
    image.save(tmp_path / f"x.{form}", exif=exif, **more.get(mode, {}))
    found, expected = read_image(tmp_path / f"x.{form}"), plainly(tmp_path / f"x.{form}")
    assert found.size == expected.size and found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(expected))
