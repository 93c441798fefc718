"""metrics.csv loses no bit, and survives being cut off anywhere."""

import math
import random
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lyco_lab.errors import UserError
from lyco_lab.train.journal import COLUMNS, Journal, digests, rows

shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def row(step, loss=0.1):
    return {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1 / 3}


def write(path, steps, first=0):
    with Journal(path, first) as journal:
        for step in range(first + 1, first + steps + 1):
            journal.write(row(step, loss=math.sin(step)))


@shared_folder
@given(st.floats(allow_nan=False, width=32))
def test_a_loss_comes_back_bit_for_bit(tmp_path, loss):
    path = tmp_path / "metrics.csv"
    with Journal(path, 0) as journal:
        journal.write(row(1, loss))
    written = path.read_text().splitlines()[1].split(",")[COLUMNS.index("loss")]
    assert struct.pack("<d", float(written)) == struct.pack("<d", loss)


def test_what_is_not_known_is_left_empty(tmp_path):
    write(tmp_path / "metrics.csv", 1)
    header, line = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "step,loss,lr,lr_text_encoder,grad_norm,delta_norm,validation_loss"
    assert line == f"1,{math.sin(1)!r},0.001,,{1 / 3!r},,"


@shared_folder
@given(st.data())
def test_going_on_gives_the_same_file_wherever_it_was_cut(tmp_path, data):
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    write(whole, 8)
    content = whole.read_bytes()
    cut.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    rows = len(digests(cut)) - 1
    step = data.draw(st.integers(0, rows))  # that of a checkpoint, at or before the last row
    write(cut, 8 - step, first=step)
    assert cut.read_bytes() == content
    with Journal(cut, step) as journal:
        assert journal.digest == digests(whole)[step]


def test_rows_count_up_to_the_first_gap(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, 5)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))
    assert len(digests(path)) == 1 + 2
    assert len(digests(tmp_path / "none.csv")) == 1


def test_a_changed_byte_ends_the_table_or_changes_each_digest_from_there_on(tmp_path):
    file, rng = tmp_path / "metrics.csv", random.Random(0)
    write(file, 40)
    whole = file.read_bytes()
    before = digests(file)
    for _ in range(300):
        content = bytearray(whole)
        place = rng.randrange(len(content))
        content[place] = rng.randrange(256)
        file.write_bytes(content)
        found = digests(file)
        assert [row["step"] for row in rows(file, len(found) - 1)] == list(range(1, len(found)))
        row = whole[:place].count(b"\n")  # 0 is the head
        changed = content != whole and row > 0
        same = [a == b for a, b in zip(found, before, strict=False)]
        assert same == [not changed or step < row for step in range(len(same))]


def test_rows_that_a_checkpoint_counts_on_must_be_there(tmp_path):
    write(tmp_path / "metrics.csv", 2)
    with pytest.raises(ValueError, match="has 2 whole rows up to step 3"):
        Journal(tmp_path / "metrics.csv", 3)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "train").write_text("in the way")
    with pytest.raises(UserError, match="train"):
        Journal(tmp_path / "train" / "metrics.csv", 0)
