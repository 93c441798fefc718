"""What lies in a folder, however odd: files, and what is none."""

import os
import socket
from pathlib import Path

import pytest

from lyco_lab.data.check import check
from lyco_lab.data.index import build
from lyco_lab.data.memo import Memo
from lyco_lab.data.scan import pseudo, walk
from lyco_lab.data.sources import Source
from lyco_lab.errors import UserError
from tests.data import pictures


def test_only_regular_files_are_looked_at(tmp_path, monkeypatch):
    """A pipe would be waited for without end."""
    root = pictures.folder(tmp_path / "in", ((64, 64),))
    os.mkfifo(root / "a.png")
    os.mkfifo(root / "b.txt")
    (root / "c.png").symlink_to("/dev/zero")
    (root / "manifest.jsonl").symlink_to("/dev/zero")
    monkeypatch.chdir(root)  # as the name of a socket has at most 108 letters
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("d.png")
        index = build([Source(root)], Memo())
    assert index.captions() == ["sks dog, tag 0, outside"]
    why = "no regular file: a pipe, a socket or a device"
    assert [os.path.basename(lost.path) for lost in index.dropped] == ["a.png", "c.png", "d.png"]
    assert {lost.reason for lost in (*index.dropped, *index.other)} == {why}


@pytest.mark.parametrize("folder", ["/proc/self", "/proc", "/sys", "/dev"])
def test_what_is_on_no_disk_is_no_folder_of_images(tmp_path, folder):
    (tmp_path / "link").symlink_to(folder)
    for named in (folder, tmp_path / "link"):
        with pytest.raises(UserError, match="is the kernel's, which holds no files"):
            build([Source(Path(named))], Memo())
    root = pictures.folder(tmp_path / "in")
    (root / "kernel").symlink_to(folder)
    index = build([Source(root)], Memo())
    assert len(index) == 3
    assert [lost.reason for lost in index.other] == ["link to what is on no disk"]


def test_memory_that_is_mounted_is_a_disk():
    assert not pseudo(Path("/dev/shm/pictures")) and pseudo(Path("/dev/shmem"))


def test_no_link_leads_out_to_a_folder_above(tmp_path):
    root = pictures.folder(tmp_path / "all" / "in")
    pictures.folder(tmp_path / "all" / "others")
    (root / "up").symlink_to(tmp_path / "all")
    (root / "top").symlink_to("/")
    index = build([Source(root)], Memo())
    assert len(index) == 3
    assert {lost.reason for lost in index.other} == {"link to a folder above the folder of images"}


def test_folders_of_any_depth(tmp_path):
    depth = 1100  # more than functions that call themselves may
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(depth):
            os.mkdir("a")
            os.chdir("a")
    finally:
        os.chdir(here)
    found = list(walk(tmp_path, []))
    for folder in reversed(found[1:]):  # what cleans up after a test calls itself
        os.rmdir(tmp_path / folder.path)
    assert len(found) == depth + 1 and found[-1].path == "/".join("a" * depth)


def test_names_that_no_screen_or_table_can_show(tmp_path):
    root = pictures.folder(tmp_path / "in", ((64, 64),))
    pictures.image(root / "two\nlines.png", caption="x")
    (root / "bad\x1b[31m.png").write_bytes(b"")
    for name in (b"\xff.png", b"\xffdir", b"\xff.txt"):
        path = os.fsencode(root) + b"/" + name
        os.mkdir(path) if name.endswith(b"dir") else open(path, "wb").close()
    index = build([Source(root)], Memo())
    assert len(index) == 2 and index.texts["file"].to_pylist()[1] == "two\nlines.png"
    assert sorted(lost.reason.partition(":")[0] for lost in index.dropped) == [
        "empty file", "name not UTF-8", "name not UTF-8", "name not UTF-8",
    ]  # fmt: skip
    assert all(line.isprintable() for line in index.report())
    index.write(tmp_path / "images.csv")
    assert "\\udcff.png" in (tmp_path / "images.csv").read_text()


def test_a_mask_that_is_no_file_is_not_waited_for(tmp_path):
    root = pictures.folder(tmp_path / "in")
    (root / "mask" / "0.png").mkdir(parents=True)
    os.mkfifo(root / "mask" / "1.png")
    (root / "mask" / "2.png").symlink_to("/dev/zero")
    index, _, _ = check(build([Source(root, masks="files")], Memo()), Memo())
    assert len(index) == 0
    why = "mask no regular file: a folder, a pipe or a device"
    assert [lost.reason for lost in index.dropped].count(why) == 3
