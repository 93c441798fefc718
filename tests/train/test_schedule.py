"""Schedules by their laws: where they begin and end, that they fall, and which are the same."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.config import Train
from lyco_lab.config.training import SCHEDULES
from lyco_lab.train.schedule import share

needs = {"cosine_restarts": {"schedule_restarts": 2}, "polynomial": {"schedule_power": 2.0}}
falling = st.sampled_from([kind for kind in SCHEDULES if kind != "constant"])
ends = st.none() | st.floats(0, 0.9)


@st.composite
def lengths(draw):
    warmup = draw(st.integers(0, 30))
    return {"warmup_steps": warmup, "steps": warmup + draw(st.integers(8, 200))}


def shares(settings):
    return [share(settings, step) for step in range(settings.steps)]


def made(kind, lengths, end=None, **others):
    return Train(schedule=kind, schedule_end=end, **lengths, **(needs.get(kind, {}) | others))


@given(st.sampled_from(SCHEDULES), lengths())
def test_every_schedule_begins_with_the_same_warm_up_and_then_the_whole_rate(kind, lengths):
    found, warmup = shares(made(kind, lengths)), lengths["warmup_steps"]
    for step in range(warmup):
        assert found[step] == float(Fraction(step + 1, warmup))
    assert found[warmup] == 1


@given(falling, lengths(), ends)
def test_no_step_is_wasted_and_none_is_above_its_rate(kind, lengths, end):
    found = shares(made(kind, lengths, end))[lengths["warmup_steps"] :]
    assert all((end or 0) < value <= 1 for value in found)


@given(falling.filter(lambda kind: kind != "cosine_restarts"), lengths(), ends)
def test_it_falls_with_every_step_towards_its_end(kind, lengths, end):
    settings = made(kind, lengths, end)
    found = shares(settings)[lengths["warmup_steps"] :]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)
    # At the step after the last it would be there.
    assert share(settings, settings.steps) == pytest.approx(end or 0, abs=1e-12)


@given(lengths(), ends)
def test_a_polynomial_of_power_one_is_linear(lengths, end):
    polynomial = made("polynomial", lengths, end, schedule_power=1.0)
    assert shares(polynomial) == shares(made("linear", lengths, end))


@given(lengths(), ends, st.integers(1, 3))
def test_restarts_are_one_cosine_again_and_again(lengths, end, restarts):
    cycles = restarts + 1
    warmup, left = lengths["warmup_steps"], lengths["steps"] - lengths["warmup_steps"]
    again = shares(made("cosine_restarts", lengths, end, schedule_restarts=restarts))[warmup:]
    slow = {"warmup_steps": 0, "steps": left * cycles}
    one = shares(made("cosine", {"warmup_steps": 0, "steps": left}, end))
    whole = [share(made("cosine", slow, end), step) for step in range(left * cycles)]
    if left % cycles == 0:
        assert again == pytest.approx(one[::cycles] * cycles)
    for n, value in enumerate(again):  # p of the fraction, in whole numbers
        assert value == pytest.approx(whole[n * cycles % left * cycles])
    rises = sum(b > a for a, b in zip(again, again[1:], strict=False))
    assert rises == restarts


@given(lengths(), st.floats(0, 0.9))
def test_a_cosine_is_half_way_in_the_middle(lengths, end):
    settings = made("cosine", {"warmup_steps": 0, "steps": 2 * lengths["steps"]}, end)
    assert share(settings, lengths["steps"]) == pytest.approx((1 + end) / 2)
    assert share(settings, 0) == 1


@given(lengths(), st.floats(0.3, 4))
def test_each_matches_its_formula(lengths, power):
    warmup, steps = lengths["warmup_steps"], lengths["steps"]
    for step in range(warmup, steps):
        p = (step - warmup) / (steps - warmup)
        expected = {
            "constant": 1,
            "linear": 1 - p,
            "cosine": 0.5 + 0.5 * math.cos(math.pi * p),
            "polynomial": (1 - p) ** power,
        }
        for kind, value in expected.items():
            others = {"schedule_power": power} if kind == "polynomial" else {}
            assert share(made(kind, lengths, **others), step) == pytest.approx(value, abs=1e-12)
