"""Rows on disk: what is read is what was written, or is known to be damaged."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.data.shards import Damaged, Shards, key

plain = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5)
parts = st.lists(plain, max_size=4)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "mean": rng.normal(size=(count, 4, 3, 2)).astype(np.float32),
        "half": rng.normal(size=(count, 5)).astype(np.float16),
        "mask": rng.integers(0, 256, (count, 3, 2), dtype=np.uint8),
    }


def keys(count, what="x"):
    return [key(what, i) for i in range(count)]


def same(row, written, i):
    return row.keys() == written.keys() and all(
        np.array_equal(row[name], written[name][i]) and row[name].dtype == written[name].dtype
        for name in row
    )


@given(parts, parts)
def test_keys_differ_where_what_they_stand_for_does(one, other):
    assert (key(*one) == key(*other)) == (
        [(type(a), a) for a in one] == [(type(a), a) for a in other]
    )


@pytest.mark.parametrize("reopened", [False, True])
def test_rows_are_found_again(tmp_path, reopened):
    shards = Shards(tmp_path)
    written = {"a": rows(5), "b": rows(3, seed=1)}
    for name, tensors in written.items():
        shards.write(keys(len(tensors["mean"]), name), tensors)
    if reopened:
        shards = Shards(tmp_path)
    for name, tensors in written.items():
        places = shards.places(keys(len(tensors["mean"]), name))
        assert all(same(shards.row(place), tensors, i) for i, place in enumerate(places))
    assert shards.places([key("nothing")]).tolist() == [[-1, -1]]
    assert shards.damaged == 0


def test_a_row_that_was_read_may_be_changed(tmp_path):
    shards = Shards(tmp_path)
    shards.write(keys(1), rows(1))
    place = shards.places(keys(1))[0]
    shards.row(place)["mean"][:] = 0
    assert same(shards.row(place), rows(1), 0)


def test_more_files_than_are_mapped_at_once(tmp_path):
    shards = Shards(tmp_path)
    for i in range(40):
        shards.write([key(i)], rows(1, seed=i))
    places = shards.places([key(i) for i in range(40)])
    for i in (*range(40), 0, 39):
        assert same(shards.row(places[i]), rows(1, seed=i), 0)
    assert len(shards._maps) <= 8


def spoiled(tmp_path, spoil):
    shards = Shards(tmp_path)
    shards.write(keys(4), rows(4))
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    file.write_bytes(spoil(data))


SPOILS = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "cut in its header": lambda data: data[:40],
    "longer": lambda data: data + b"x",
    "not what it says": lambda data: b"\xff" * len(data),
    "a length beyond the file": lambda data: b"\xff\xff\xff\x7f\0\0\0\0" + data[8:],
    "no JSON": lambda data: data[:8] + b"!" + data[9:],
    "a list": lambda data: (2).to_bytes(8, "little") + b"[]",
    "a number": lambda data: (1).to_bytes(8, "little") + b"1",
    "a tensor without rows": lambda data: (8).to_bytes(8, "little") + b'{"a":[]}',
    "too deep": lambda data: (9**5).to_bytes(8, "little") + b"[" * 9**5,
    "another thing": lambda data: data.replace(b'"F32"', b'"X99"'),
}


@pytest.mark.parametrize("kind", SPOILS)
def test_files_that_cannot_be_are_set_aside(tmp_path, kind):
    spoiled(tmp_path, SPOILS[kind])
    shards = Shards(tmp_path)
    assert shards.damaged == 1 and (shards.places(keys(4)) == -1).all()
    assert not list(tmp_path.glob("*.safetensors"))
    shards.write(keys(4), rows(4))
    assert same(shards.row(shards.places(keys(4))[2]), rows(4), 2)


def spoilt(data, rng):
    """Changed in one byte, a few, or cut: in the header as often as in the rest."""
    data = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 1, 1, 3])):
        at = rng.integers(0, header) if rng.random() < 0.5 else rng.integers(header, len(data))
        data[at] = (data[at] + rng.integers(1, 256)) % 256
    return data[: rng.integers(0, len(data))] if rng.random() < 0.1 else data


def test_no_changed_byte_gives_another_row(tmp_path):
    Shards(tmp_path).write(keys(4), rows(4))
    (file,) = tmp_path.glob("*.safetensors")
    good, rng = file.read_bytes(), np.random.default_rng(0)
    header = good[8 : 8 + int.from_bytes(good[:8], "little")]
    other_types = [good.replace(b"F32", b"I32"), good.replace(b"F16", b"I16")]
    swapped = good.replace(header, header.replace(b"[4,3,2]", b"[4,2,3]"))
    for data in (*other_types, swapped, *(spoilt(good, rng) for _ in range(800))):
        file.write_bytes(data)
        shards = Shards(tmp_path)
        for i, place in enumerate(shards.places(keys(4))):
            if place[0] < 0:
                continue  # it is made anew
            try:
                row = shards.row(place)
            except Damaged as damaged:
                assert damaged.shard == place[0]
                continue
            assert same(row, rows(4), i)


def test_a_damaged_file_is_discarded_with_all_its_rows(tmp_path):
    shards = Shards(tmp_path)
    shards.write(keys(3), rows(3))
    shards.write(keys(2, "y"), rows(2, seed=5))
    place = shards.places(keys(3))[0]
    assert shards.discard(int(place[0])) == keys(3)
    assert (shards.places(keys(3)) == -1).all()
    assert same(shards.row(shards.places(keys(2, "y"))[1]), rows(2, seed=5), 1)
    with pytest.raises(Damaged):
        shards.row(place)


def test_what_a_kill_left_behind_is_no_row(tmp_path):
    (tmp_path / ".part-x").mkdir()
    (tmp_path / ".part-x" / "y.safetensors").write_bytes(b"half")
    assert (Shards(tmp_path).places(keys(1)) == -1).all()
