"""What is written down of a training, and how two such traces are told apart."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.verify.case import as_power, parse_gamma
from lyco_lab.verify.trace import ENTRIES, Trace, digests, looks, spread
from lyco_lab.verify.verdict import DIFFERENT, EQUAL, ROUNDED, compare

LAYERS = ("unet.a", "unet.b")


def trace(deltas, losses=None):
    """Of steps whose W' - W are rows of (step, layer, entry)."""
    made = Trace(LAYERS)
    for step, row in enumerate(deltas, start=1):
        made.losses.append(1.0 if losses is None else losses[step - 1])
        made.digests.append(digests(list(row)))
        made.values[step] = [spread(delta) for delta in row]
    made.exported = made.digests[-1]
    return made


def some():
    return torch.randn(4, 2, 5, 3, generator=torch.Generator().manual_seed(0))


@given(st.integers(0, 3), st.integers(0, 1), st.integers(0, 14))
def test_a_difference_in_one_bit_has_a_step_and_a_layer(step, layer, entry):
    ours, theirs = some(), some()
    bits = theirs[step, layer].view(torch.int32).view(-1)
    bits[entry] ^= 1
    verdict = compare(trace(ours), trace(theirs))
    assert verdict.word == DIFFERENT
    assert (verdict.first_step, verdict.first_place) == (step + 1, LAYERS[layer])
    assert compare(trace(ours), trace(ours)).word == EQUAL


def test_the_loss_comes_before_what_it_moves():
    ours, theirs = trace(some()), trace(some(), [1.0, 1.0 + 1e-7, 1.0, 1.0])
    theirs.digests[1] = (b"", b"")
    verdict = compare(ours, theirs)
    assert (verdict.first_step, verdict.first_place) == (2, "the loss")


def test_a_difference_in_what_is_exported():
    ours, theirs = trace(some()), trace(some())
    theirs.exported = (ours.exported[0], b"")
    assert compare(ours, theirs).first_place == "unet.b as it is exported"


def test_a_training_that_stopped():
    ours, theirs = trace(some()), trace(some()[:2])
    theirs.stopped, theirs.exported = "the loss is nan at step 3", ()
    verdict = compare(ours, theirs)
    assert verdict.first_step == 3 and "the loss is nan" in verdict.first_place
    assert verdict.delta_error == math.inf


@pytest.mark.parametrize(("error", "word"), [(9e-4, ROUNDED), (1.1e-2, DIFFERENT)])
def test_rounding_is_what_rounding_makes(error, word):
    ours, off = some(), torch.zeros(4, 2, 5, 3)
    off[2:] = some()[2:]
    shadow, other = trace(ours * (1 + 1e-3)), trace(ours + error * off)
    verdict = compare(trace(ours), other, [trace(ours), shadow])
    assert verdict.word == word
    assert verdict.rounding == pytest.approx(1e-3, rel=1e-3)
    assert verdict.delta_error == pytest.approx(error, rel=1e-3)
    if word == DIFFERENT:
        assert verdict.first_step == 3 and verdict.first_place in LAYERS


@given(st.integers(1, 300))
def test_the_steps_that_are_looked_at(steps):
    found = looks(steps)
    assert found[0] == 1 and found[-1] == steps and found == sorted(set(found))
    assert all(b <= 2 * a for a, b in zip(found, found[1:], strict=False))


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_entries_are_few_and_from_all_columns(rows, columns):
    delta = torch.arange(columns, dtype=torch.float32).expand(rows, columns)
    kept = spread(delta)
    assert len(kept) <= ENTRIES
    if delta.numel() <= ENTRIES:
        assert torch.equal(kept, delta.flatten())
    elif columns & (columns - 1) == 0:
        assert len(kept.unique()) == columns


@given(st.integers(-60, 60))
def test_powers_are_written_as_they_are_read(power):
    assert parse_gamma(as_power(2.0**power)) == 2.0**power
    assert parse_gamma("0.03") == 0.03 and as_power(0.03) == "0.03"
