"""Every file of a folder ends as used, dropped or other, and is said to be."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lyco_lab.data import scan
from lyco_lab.data.captions import Captions
from lyco_lab.data.check import check
from lyco_lab.data.folder import read_image
from lyco_lab.data.index import build
from lyco_lab.data.memo import Memo
from lyco_lab.data.sources import Source
from lyco_lab.errors import UserError
from tests.data import pictures


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """The files that a test has just written count as settled at once."""
    monkeypatch.setattr(scan, "SETTLED_NS", -(10**12))
    monkeypatch.setattr("lyco_lab.data.check.SETTLED_NS", -(10**12))


def found(root, memo=None, **source):
    return build([Source(root, **source)], memo or Memo())


def used(index):
    return index.texts["file"].to_pylist()


def reasons(index):
    return {os.path.basename(lost.path): lost.reason for lost in index.dropped}


# What is read


def test_captions_beside_images_in_all_folders(tmp_path):
    pictures.folder(tmp_path)
    pictures.image(tmp_path / "inner" / "deep" / "a.jpg", 80, 40)
    (tmp_path / "inner" / "deep" / "a.caption").write_text("another\n")
    pictures.image(tmp_path / "z.webp", 20, 30, caption="last")
    index = found(tmp_path)
    assert used(index) == ["0.png", "1.png", "2.png", "z.webp", "inner/deep/a.jpg"]
    assert index.captions()[4] == "another"
    assert (index.width_N[4], index.height_N[4]) == (80, 40)
    assert index.texts["concept"].to_pylist() == ["", "", "", "", "deep"]
    assert index.repeats_N.tolist() == [1] * 5 and not index.dropped and not index.other


def test_the_folders_of_sd_scripts_say_repeats_and_words(tmp_path):
    pictures.image(tmp_path / "10_sks dog" / "a.png")
    pictures.image(tmp_path / "10_sks dog" / "b.png", caption="its own")
    pictures.image(tmp_path / "3_cat" / "inner" / "c.png")
    index = found(tmp_path)
    assert index.repeats_N.tolist() == [10, 10, 3]
    assert [index.captions()[i] for i in range(3)] == ["sks dog", "its own", "cat"]
    assert index.texts["concept"].to_pylist() == ["sks dog", "sks dog", "inner"]
    assert "10_sks dog: 10 repeats, as the folder's name says" in index.remarks
    assert found(tmp_path, repeats=2).repeats_N.tolist() == [2, 2, 2]
    plain = found(tmp_path, numbered=False, class_tokens="a pet")
    assert plain.repeats_N.tolist() == [1, 1, 1] and plain.captions()[2] == "a pet"


def test_the_list_of_a_hub_s_folder(tmp_path):
    for name in ("a.png", "train/b.png"):
        pictures.image(tmp_path / name)
    lines = [{"file_name": "a.png", "text": "one", "bbox": [1]},
             {"file_name": "train/b.png", "caption": "two"}]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    index = found(tmp_path)
    assert [index.captions()[i] for i in range(2)] == ["one", "two"]
    assert any("columns not used: bbox" in line for line in index.report())


def test_the_list_of_a_hub_s_folder_in_columns(tmp_path):
    for name in ("a.png", "b.png"):
        pictures.image(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(
        '\ufefffile_name,text,year\na.png,"one, two",3\nb.png,x,4\n'
    )
    index = found(tmp_path)
    assert index.captions() == ["one, two", "x"]
    assert index.texts["origin"].to_pylist() == ["metadata.csv, line 2", "metadata.csv, line 3"]
    assert any("columns not used: year" in line for line in index.report())
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png\n")
    with pytest.raises(UserError, match="metadata.csv is damaged: line 2 has 1 cells"):
        found(tmp_path)
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(UserError, match="holds metadata.csv and metadata.jsonl"):
        found(tmp_path)


# Which words are the caption

NFC, NFD = "caf\u00e9", "cafe\u0301"
NAMES = {  # image, caption file or list -> what the caption file is called in images.csv
    "upper case": ("1.png", "1.TXT"),
    "upper case of both": ("1.PNG", "1.Txt"),
    "the image's suffix too": ("1.png", "1.png.txt"),
    "the image's suffix in upper case": ("1.PNG", "1.png.caption"),
    "decomposed": (f"{NFC}.png", f"{NFD}.txt"),
    "composed": (f"{NFD}.png", f"{NFC}.png.TXT"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_caption_file_is_found_however_its_name_is_written(tmp_path, kind):
    image, text = NAMES[kind]
    root = tmp_path / "5_sks dog"
    pictures.image(root / image)
    (root / text).write_text("its own")
    index = found(root)
    assert index.captions() == ["its own"] and index.text("origin", 0) == text
    assert not index.stand_ins() and not index.other
    (root / text).write_text("\n")
    assert reasons(found(root)) == {image: f"empty caption: {text}"}


@pytest.mark.parametrize("listed", [f"{NFC}.png", f"{NFD}.PNG"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "Metadata.JSONL"])
def test_a_list_names_images_however_their_names_are_written(tmp_path, listed, name):
    pictures.image(tmp_path / f"{NFD}.png")
    line = json.dumps({"file_name": listed, "text": "x"}, ensure_ascii=False)
    (tmp_path / name).write_text(f"file_name,text\n{listed},x" if "csv" in name else line)
    index = found(tmp_path)
    assert index.captions() == ["x"] and not index.dropped


def test_words_that_stand_in_for_captions_are_counted_and_named(tmp_path):
    root = tmp_path / "5_sks dog"
    for i in range(3):
        pictures.image(root / f"{i}.png")
    (root / "captions.json").write_text("{}")
    index = found(root)
    said = "3 of 3 images have the words of their folder as caption (the first: "
    assert any(line.startswith(f"  {said}") and "'sks dog'" in line for line in index.report())
    assert any("captions.json is not read: lists of captions are" in r for r in index.remarks)
    index.write(tmp_path / "images.csv")
    with open(tmp_path / "images.csv", newline="") as file:
        origins = [row["caption_from"] for row in csv.DictReader(file)]
    assert origins == ["the words of its folder"] * 3 + [""]
    (root / "0.txt").write_text("its own")
    assert found(root).stand_ins()[0].startswith("2 of 3 images have the words of their folder")
    tokens = found(root, numbered=False, class_tokens="dog", extensions=(".caption",))
    assert tokens.stand_ins()[0].startswith("3 of 3 images have class_tokens as caption")
    said = "1 images have such words as caption though a .txt file lies beside them"
    assert any(line.startswith(said) for line in tokens.remarks)
    assert tokens.texts["origin"].to_pylist() == ["class_tokens"] * 3


def test_a_caption_in_a_suffix_that_is_not_asked_for_is_named(tmp_path):
    pictures.folder(tmp_path, ((64, 64),))
    why = "no caption: write one in 0.cap (0.txt is none by its suffix)"
    assert reasons(found(tmp_path, extensions=(".cap",))) == {"0.png": why}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_first_line_or_all(tmp_path, end):
    root = pictures.folder(tmp_path, ((64, 64),) * 2)
    (root / "0.txt").write_bytes(f" one \u2028dog{end}two{end}".encode())
    whole, first = found(root), found(root, lines="first")
    assert (
        whole.captions()[0] == f"one \u2028dog{end}two" and first.captions()[0] == "one \u2028dog"
    )
    said = "1 caption files have several lines, "
    assert [line.startswith(said) for line in (*whole.remarks, *first.remarks)] == [True, True]
    (root / "0.txt").write_bytes(f"{end}two".encode())
    assert found(root).captions()[0] == "two"
    why = "empty caption: the first line of 0.txt is blank"
    assert reasons(found(root, lines="first")) == {"0.png": why}


@pytest.mark.parametrize("where", ["folder", "list"])
def test_no_number_of_repeats_is_beyond_all_measure(tmp_path, where):
    root = tmp_path / ("x" if where == "list" else "20240101_holiday")
    pictures.image(root / "a.png", caption="x")
    if where == "list":
        line = {"file": "a.png", "caption": "x", "repeats": 10**30}
        (root / "manifest.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="1,000,000"):
        found(root)
    if where == "folder":
        assert found(root, repeats=2).repeats_N.tolist() == [2]


def test_our_list_says_more(tmp_path, tiny_concept):
    folder = shutil.copytree(tiny_concept, tmp_path / "x")
    index = found(folder)
    assert index.repeats_N.tolist() == [2] * 6
    assert index.text("attributes", 1) == '{"colour": "green"}'
    assert index.text("subclass", 5) == "big" and index.text("trigger", 0) == "sks"


def test_images_that_lie_on_their_side_are_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "webp"):
        pictures.image(tmp_path / f"{suffix}.{suffix}", 40, 20, caption="x", exif=exif)
    late = pictures.image(tmp_path / "late.png", 40, 20, caption="x")
    data = late.read_bytes()
    chunk = (tmp_path / "png.png").read_bytes()
    start = chunk.index(b"eXIf") - 4
    length = int.from_bytes(chunk[start : start + 4], "big") + 12
    late.write_bytes(data[:-12] + chunk[start : start + length] + data[-12:])  # before the end
    index = found(tmp_path)
    assert len(index) == 4
    assert set(zip(index.width_N.tolist(), index.height_N.tolist(), strict=True)) == {(20, 40)}


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><y tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("keyword", ["XML:com.adobe.xmp", "Raw profile type exif"])
def test_a_text_may_say_how_an_image_is_turned(tmp_path, keyword):
    """Else its size by the header is not the size that is read later."""
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes()
    if keyword.startswith("Raw"):
        info.add_text(keyword, f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    else:
        info.add_itxt(keyword, XMP)
    pictures.image(tmp_path / "a.png", 40, 20, caption="x", pnginfo=info)
    index = found(tmp_path)
    assert (index.width_N[0], index.height_N[0]) == (20, 40) == read_image(tmp_path / "a.png").size


def test_masks_are_found_and_are_no_images(tmp_path):
    pictures.folder(tmp_path)
    pictures.image(tmp_path / "0.mask.png", mode="L")
    pictures.image(tmp_path / "mask" / "1.png", mode="L")
    index = found(tmp_path, masks="files")
    assert used(index) == ["0.png", "1.png", "2.png"]
    assert index.texts["mask"].to_pylist() == ["0.mask.png", "mask/1.png", ""]
    assert any("2 of 3 images have a mask" in line for line in index.report())
    os.rename(tmp_path / "0.mask.png", tmp_path / "0.Mask.PNG")
    os.rename(tmp_path / "mask" / "1.png", tmp_path / "mask" / "1.PNG")
    index = found(tmp_path, masks="files")
    assert index.texts["mask"].to_pylist() == ["0.Mask.PNG", "mask/1.PNG", ""]
    os.rename(tmp_path / "0.Mask.PNG", tmp_path / "0.mask.png")
    pictures.image(tmp_path / "mask" / "0.png", mode="L")
    assert (
        "two masks: 0.mask.png and mask/0.png" in reasons(found(tmp_path, masks="files"))["0.png"]
    )


# What is dropped, each by name


def write(data):
    return lambda path: path.write_bytes(data)


BAD = {
    "zero bytes": (write(b""), "empty file: it has no bytes"),
    "no image": (write(b"hello there, I am text"), "not an image: no PNG, JPEG, WEBP, BMP"),
    "cut header": (write(pictures.encoded("PNG")[:20]), "damaged: "),
    "cut before its end": (write(pictures.encoded("PNG")[:-8]), "damaged: the file ends too early"),
    "a wrong checksum": (
        write(pictures.png(8, 8).replace(b"\x08\x02\x00\x00\x00", b"\x08\x02\x00\x00\x01", 1)),
        "damaged: a checksum is wrong",
    ),
    "no size": (write(pictures.png(0, 8)), "damaged: it has no size"),
    "CMYK": (write(pictures.encoded("JPEG", mode="CMYK")), "CMYK: convert it to RGB"),
    "16 bits": (write(pictures.png(8, 8, bits=16)), "16 bits per channel: save it with 8"),
    "animated PNG": (write(pictures.animation("PNG")), "animated: 3 frames"),
    "animated WEBP": (write(pictures.animation("WEBP")), "animated: 3 frames"),
    "a bomb of a PNG": (write(pictures.png(60_000, 60_000)), "too many pixels: 60000 x 60000"),
    "a bomb of a BMP": (
        write(pictures.encoded("BMP")[:18] + b"\x60\xea\0\0" * 2 + pictures.encoded("BMP")[26:]),
        "too many pixels: ",
    ),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "broken link"),
    "link to itself": (lambda path: path.symlink_to(path.name), "link in a circle"),
}


@pytest.mark.parametrize("kind", BAD)
def test_images_that_cannot_be_used_are_named_and_counted(tmp_path, kind):
    spoil, reason = BAD[kind]
    pictures.folder(tmp_path)
    bad = tmp_path / "bad.png"
    bad.with_suffix(".txt").write_text("caption")
    spoil(bad)
    index = found(tmp_path)
    assert used(index) == ["0.png", "1.png", "2.png"]
    assert reasons(index)["bad.png"].startswith(reason)
    assert sum(index.reasons().values()) == 1
    index.write(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        rows = {os.path.basename(row["file"]): row for row in csv.DictReader(file)}
    assert rows["bad.png"]["status"] == "dropped"
    assert rows["bad.png"]["reason"] == reasons(index)["bad.png"]
    assert rows["1.png"]["status"] == "used" and rows["1.png"]["caption"].startswith("sks dog")


CAPTIONS = {
    "missing": (None, "no caption: write one in 0.txt or 0.caption"),
    "empty": (b" \n", "empty caption: 0.txt"),
    "Latin-1": ("gr\u00fcn".encode("latin-1"), "caption not UTF-8: 0.txt"),
    "UTF-16": ("hello".encode("utf-16"), "caption not UTF-8: 0.txt"),
    "a book": (b"word " * 20_000, "caption too long: 0.txt"),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_captions_that_cannot_be_used(tmp_path, kind):
    data, reason = CAPTIONS[kind]
    pictures.folder(tmp_path)
    (tmp_path / "0.txt").unlink()
    if data is not None:
        (tmp_path / "0.txt").write_bytes(data)
    index = found(tmp_path)
    assert used(index) == ["1.png", "2.png"]
    assert reasons(index)["0.png"].startswith(reason)


def test_names_used_twice_and_captions_that_differ(tmp_path):
    pictures.folder(tmp_path)
    pictures.image(tmp_path / "0.jpg")
    (tmp_path / "1.caption").write_text("something else")
    (tmp_path / "2.caption").write_text((tmp_path / "2.txt").read_text())
    index = found(tmp_path)
    assert used(index) == ["2.png"]
    assert reasons(index) == {
        "0.png": "name used twice: 0.jpg lies beside it",
        "0.jpg": "name used twice: 0.png lies beside it",
        "1.png": "two captions: 1.txt and 1.caption differ",
    }


def test_lists_and_folders_that_disagree(tmp_path):
    pictures.folder(tmp_path)
    pictures.image(tmp_path / "extra.png")
    lines = [
        {"file": "0.png", "caption": "not what 0.txt says"},
        {"file": "1.png", "caption": (tmp_path / "1.txt").read_text()},
        {"file": "1.png", "caption": "again"},
        {"file": "gone.png", "caption": "x"},
        {"file": "2.png", "caption": (tmp_path / "2.txt").read_text(), "repeats": 0},
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    index = found(tmp_path)
    assert used(index) == ["1.png"]
    assert sorted(lost.reason.partition(":")[0] for lost in index.dropped) == [
        "0 repeats", "listed and missing", "listed twice", "not listed", "two captions",
    ]  # fmt: skip


def test_other_formats_and_other_files_are_counted(tmp_path):
    pictures.folder(tmp_path)
    for name in ("a.gif", "b.TIFF", "notes.md", "lone.txt", ".hidden.png", "LICENSE"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".git").mkdir()
    index = found(tmp_path)
    assert reasons(index) == {
        "a.gif": "format not supported: .gif",
        "b.TIFF": "format not supported: .tiff",
    }
    kinds = {os.path.basename(lost.path): lost.reason for lost in index.other}
    assert kinds == {
        "notes.md": ".md files",
        "lone.txt": "captions without an image",
        ".hidden.png": "hidden file",
        "LICENSE": "files without a suffix",
        ".git": "hidden folder",
    }


def test_folders_linked_in_a_circle_are_read_once(tmp_path):
    inner = pictures.folder(tmp_path / "inner")
    (inner / "back").symlink_to(tmp_path)
    (inner / "again").symlink_to(inner)
    (tmp_path / "other").symlink_to(inner)
    index = found(tmp_path)
    assert used(index) == ["inner/0.png", "inner/1.png", "inner/2.png"]
    assert sum("folder read already" in lost.reason for lost in index.other) == 3


def test_sub_folders_of_a_source_without_any(tmp_path):
    pictures.folder(tmp_path)
    pictures.folder(tmp_path / "inner")
    index = found(tmp_path, recursive=False)
    assert len(index) == 3
    assert [lost.reason for lost in index.other] == ["sub-folder: this source has none"]


def test_a_trigger_that_has_to_be_there(tmp_path):
    pictures.folder(tmp_path)
    (tmp_path / "1.txt").write_text("a dog")
    index = found(tmp_path, captions=Captions(trigger="sks"), needs_trigger=True)
    assert reasons(index) == {"1.png": "no trigger: its caption lacks 'sks'"}


def test_pixels_that_end_too_early_are_found_by_decoding(tmp_path):
    for i, suffix in enumerate(("jpg", "png", "bmp", "webp")):
        pictures.image(tmp_path / f"{i}.{suffix}", caption="x")
    whole = {path: path.read_bytes() for path in tmp_path.glob("[0-9].*") if path.suffix != ".txt"}
    for path, data in whole.items():
        path.write_bytes(data[: len(data) * 2 // 3])
    pictures.image(tmp_path / "good.png", caption="x")
    index = found(tmp_path)
    left, digests, kept = check(index, Memo())
    assert used(left) == ["good.png"] and len(digests) == len(kept) == 1
    assert len(left.dropped) == 4
    assert all(lost.reason.startswith("damaged: ") for lost in left.dropped)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "0.png"', "line 1: not JSON"),
        ("[1]", "line 1: needs an object"),
        ('{"file": "0.png", "caption": "x", "captoin": 1}', "did you mean 'caption'"),
        ('{"file": "../0.png", "caption": "x"}', "not below the folder"),
        ('{"file": "/0.png", "caption": "x"}', "not below the folder"),
        ('{"file": "0.png", "caption": "x", "concept": 3}', "concept needs to be text"),
        ('{"file": "0.png", "caption": "x", "attributes": 3}', "attributes needs an object"),
    ],
)
def test_lists_that_are_not_well_formed_stop_everything(tmp_path, line, message):
    pictures.folder(tmp_path)
    (tmp_path / "manifest.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        found(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"}', "needs a file_name"),
        ('{"file_name": "0.png", "text": "x", "caption": "y"}', "text and caption differ"),
        ('{"file_name": "0.png", "text": 3}', "the caption needs to be text"),
    ],
)
def test_a_hub_s_list_that_is_not_well_formed(tmp_path, line, message):
    pictures.folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        found(tmp_path)


def test_two_lists_and_no_folder(tmp_path):
    pictures.folder(tmp_path)
    for name in ("manifest.jsonl", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="keep one of them"):
        found(tmp_path)
    with pytest.raises(UserError, match="the folder of images .*nowhere does not exist"):
        found(tmp_path / "nowhere")


# What is remembered


def test_a_second_look_reads_no_file(tmp_path):
    pictures.folder(tmp_path / "in")
    memo = Memo(tmp_path / "files.arrow")
    first, digests, _ = check(found(tmp_path / "in", memo), memo)
    assert memo.read == 9  # images, captions, and images again to the last pixel
    memo = Memo(tmp_path / "files.arrow")
    second, again, _ = check(found(tmp_path / "in", memo), memo)
    assert memo.read == 0
    assert again == digests and used(second) == used(first)
    assert second.texts["caption"].equals(first.texts["caption"])
    assert second.width_N.tolist() == first.width_N.tolist()


def back(path, stamp):
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.parametrize("name", ["1.png", "1.txt"])
def test_an_edit_that_puts_size_and_time_back_is_seen(tmp_path, name):
    root = pictures.folder(tmp_path / "in")
    memo = Memo(tmp_path / "files.arrow")
    before, digests, _ = check(found(root, memo), memo)
    file, stamp = root / name, (root / name).stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    back(file, stamp)
    assert file.stat().st_size == stamp.st_size and file.stat().st_mtime_ns == stamp.st_mtime_ns
    memo = Memo(tmp_path / "files.arrow")
    after, again, _ = check(found(root, memo), memo)
    assert memo.read > 0
    assert (again, after.texts["caption"].to_pylist()) != (
        digests,
        before.texts["caption"].to_pylist(),
    )


def test_what_was_just_written_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "SETTLED_NS", 10**12)
    root = pictures.folder(tmp_path / "in")
    memo = Memo(tmp_path / "files.arrow")
    found(root, memo)
    memo = Memo(tmp_path / "files.arrow")
    found(root, memo)
    assert memo.read == 6


def test_a_mask_is_part_of_an_image_s_digest_and_can_be_bad(tmp_path):
    root = pictures.folder(tmp_path / "in")
    seen = []
    for seed in (0, 1, 1):
        pictures.image(root / "1.mask.png", seed=seed, mode="L")
        memo = Memo(tmp_path / "files.arrow")
        seen.append(check(found(root, memo, masks="files"), memo)[1])
    assert seen[0] != seen[1] == seen[2]
    assert [a == b for a, b in zip(*seen[:2], strict=True)] == [True, False, True]
    (root / "1.mask.png").write_bytes(b"x")
    left, _, kept = check(found(root, masks="files"), Memo())
    assert used(left) == ["0.png", "2.png"] and kept.tolist() == [0, 2]
    assert reasons(left)["1.png"].startswith("mask not an image")


def test_bad_files_are_remembered_until_they_change(tmp_path):
    root = pictures.folder(tmp_path / "in")
    (root / "0.png").write_bytes(b"")
    memo = Memo(tmp_path / "files.arrow")
    assert len(found(root, memo)) == 2
    memo = Memo(tmp_path / "files.arrow")
    assert len(found(root, memo)) == 2 and memo.read == 0
    pictures.image(root / "0.png")
    assert len(found(root, Memo(tmp_path / "files.arrow"))) == 3


def test_no_changed_byte_of_a_memo_gives_another_caption(tmp_path, capsys):
    root, path = pictures.folder(tmp_path / "in"), tmp_path / "files.arrow"
    expected = found(root, Memo(path)).captions()
    good, rng = path.read_bytes(), np.random.default_rng(0)
    spoils = [b"", b"nonsense", b"ARROW1\0\0" + b"x" * 100, good + b"x", good[:-1], good[1:]]
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(0, len(data), rng.choice([1, 1, 3])):
            data[at] = (data[at] + rng.integers(1, 256)) % 256
        spoils.append(bytes(data[: rng.integers(0, len(data))] if rng.random() < 0.1 else data))
    capsys.readouterr()
    for data in spoils:
        path.write_bytes(data)
        memo = Memo(path)
        assert "files.arrow is damaged" in capsys.readouterr().out
        assert memo.find(str(root / "0.txt"), scan.Stamp(1, 2, 3)) is None
    assert found(root, memo).captions() == expected and memo.read == 6
    assert found(root, memo := Memo(path)).captions() == expected and memo.read == 0
    assert not capsys.readouterr().out


def test_balance_gives_each_class_as_much(tmp_path):
    for name, count in (("a", 8), ("b", 3), ("c", 1)):
        for i in range(count):
            pictures.image(tmp_path / name / f"{i}.png", 16, 16, caption="x")
    index = found(tmp_path).balanced()
    samples = {}
    for concept, times in zip(index.texts["concept"].to_pylist(), index.repeats_N, strict=True):
        samples[concept] = samples.get(concept, 0) + int(times)
    assert samples == {"a": 8, "b": 9, "c": 8}
