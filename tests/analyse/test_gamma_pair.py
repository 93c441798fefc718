"""Bitwise comparison: equal means every bit of every step, and nothing less is called equal."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyco_lab.analyse.gamma_pair import compare, exact, read_losses, write
from lyco_lab.errors import UserError

losses = st.dictionaries(
    st.integers(1, 500), st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20
)


@given(losses=losses)
def test_a_run_equals_itself_even_where_its_loss_is_not_a_number(losses):
    verdict = compare("a", "b", losses, dict(losses))
    assert verdict.equal
    assert (verdict.steps, verdict.extra_steps, verdict.first_difference) == (len(losses), 0, None)
    assert verdict.largest_gap == 0.0
    assert f"all {len(losses)} losses are bitwise equal" in verdict.sentence


@given(losses=losses, data=st.data())
def test_one_unit_in_the_last_place_at_one_step_is_found_and_named(losses, data):
    step = data.draw(st.sampled_from(sorted(losses)))
    moved = dict(losses)
    moved[step] = float(np.nextafter(losses[step], 0.0)) if losses[step] else -losses[step]
    if math.isnan(losses[step]):
        moved[step] = 1.0
    verdict = compare("a", "b", losses, moved)
    assert not verdict.equal
    assert verdict.first_difference.step == step
    assert f"first at step {step}" in verdict.sentence


def test_the_first_of_several_differences_is_named_and_the_largest_measured():
    verdict = compare("a", "b", {1: 0.5, 2: 0.5, 3: 1.0}, {1: 0.5, 2: 0.25, 3: 0.0})
    assert verdict.first_difference.step == 2
    assert verdict.largest_gap == 1.0


def test_a_shorter_run_is_not_equal_though_its_steps_are():
    verdict = compare("a", "b", {1: 0.5, 2: 0.25}, {1: 0.5})
    assert not verdict.equal
    assert verdict.steps == 1
    assert "one run has 1 more" in verdict.sentence


def test_comparing_nothing_proves_nothing():
    assert not compare("a", "b", {}, {}).equal
    assert "nothing was compared" in compare("a", "b", {1: 0.5}, {2: 0.5}).sentence


def test_minus_zero_is_not_zero():
    assert not compare("a", "b", {1: 0.0}, {1: -0.0}).equal


@given(value=st.floats(allow_nan=False))
def test_both_ways_of_writing_a_float_are_read_exactly(value):
    assert exact(value.hex()) == exact(repr(value)) == value


@settings(max_examples=10)
@given(losses=losses)
def test_files_keep_every_bit(losses, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    lines = [f"{step},{loss.hex()},0.1" for step, loss in losses.items()]
    (folder / "metrics.csv").write_text("\n".join(["step,loss,lr", *lines]) + "\n")
    found = read_losses(folder / "metrics.csv")
    verdict = compare("with", "without", found, found)
    write([verdict], folder / "gamma.csv")
    with (folder / "gamma.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["pair", "step", "loss_gamma", "loss_rewritten"]
    again = {int(row["step"]): exact(row["loss_gamma"]) for row in rows}
    assert compare("x", "y", losses, again).equal


def test_a_run_that_was_not_trained_is_named(tmp_path):
    with pytest.raises(UserError, match="train that run first"):
        read_losses(tmp_path / "train" / "metrics.csv")
