"""Memory is bounded by pixels, over all threads."""

import threading
import time

import pytest

from lyco_lab.data import check, scan
from lyco_lab.data.index import build
from lyco_lab.data.memo import Memo
from lyco_lab.data.room import Room
from lyco_lab.data.sources import Source
from tests.data import pictures


@pytest.mark.parametrize(("pixels", "most"), [(4096, 1), (100, 1), (2 * 4096, 2), (10**6, 4)])
def test_threads_decode_no_more_pixels_at_once_than_there_is_room_for(
    tmp_path, monkeypatch, pixels, most
):
    monkeypatch.setattr(scan, "SETTLED_NS", -(10**12))
    root = pictures.folder(tmp_path / "in", ((64, 64),) * 8)
    inside, at_once, lock, decode = [], [], threading.Lock(), check.decode

    def watched(path):
        with lock:
            inside.append(path)
            at_once.append(len(inside))
        time.sleep(0.02)
        with lock:
            inside.remove(path)
        return decode(path)

    monkeypatch.setattr(check, "cores", lambda: 4)
    monkeypatch.setattr(check, "decode", watched)
    monkeypatch.setattr(check, "ROOM", Room(pixels))
    index, digests, _ = check.check(build([Source(root)], Memo()), Memo())
    assert len(index) == len(digests) == 8
    assert max(at_once) == most


def test_what_goes_wrong_inside_leaves_its_room():
    room = Room(10)
    for _ in range(3):
        with pytest.raises(ValueError, match="x"), room.of(8):
            raise ValueError("x")
    with room.of(10):
        pass
