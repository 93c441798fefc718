"""Charts: coordinates that keep their order, round ticks, and well-formed drawings."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.report.figures import (
    HEIGHT,
    WIDTH,
    Line,
    Point,
    curve_axes,
    curves,
    marker,
    number,
    scatter,
    scatter_axes,
    smoothed,
    ticks,
)
from tests.strategies import seeds  # noqa: F401  (loads the profile)

numbers = st.floats(min_value=-50, max_value=50)
points = st.lists(
    st.builds(
        Point,
        label=st.text("abc<&\"'-", min_size=1, max_size=12),
        series=st.integers(0, 20),
        x=numbers | st.just(math.nan),
        y=numbers,
        x_error=st.floats(0, 5) | st.just(math.nan),
        y_error=st.floats(0, 5),
        role=st.sampled_from(["run", "base", "real"]),
    ),
    max_size=8,
)


@given(low=numbers, span=st.floats(1e-3, 1e3))
def test_ticks_are_round_evenly_spaced_and_inside(low, span):
    found = ticks(low, low + span, 5)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-6 * span <= tick <= low + span + 1e-6 * span for tick in found)
    step = found[1] - found[0]
    digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(digits - round_one) for round_one in (1, 2, 5, 10)) < 1e-6
    assert all(abs(b - a - step) < 1e-6 * span for a, b in zip(found, found[1:], strict=False))


@given(points=points)
def test_a_scatter_is_well_formed_and_every_known_point_has_one_mark_inside_it(points):
    axes = scatter_axes(points, "x", "y")
    drawing = ElementTree.fromstring(scatter(points, axes, 'what "it" shows'))
    known = [p for p in points if math.isfinite(p.x)]
    marks = [e for e in drawing.iter() if "mark" in e.get("class", "")]
    assert len(marks) == len(known)
    names = [e.text for e in drawing.iter("text") if "name" in e.get("class", "")]
    assert sorted(names) == sorted(p.label for p in known)
    for p in known:
        assert 0 < axes.px(p.x) < WIDTH and 0 < axes.py(p.y) < HEIGHT


@given(a=numbers, b=numbers)
def test_right_is_more_and_up_is_more(a, b):
    axes = scatter_axes([Point("p", 0, a, a, 1, 1), Point("q", 1, b, b, 1, 1)], "x", "y")
    if abs(a - b) > 0.1:
        assert (axes.px(a) < axes.px(b)) == (a < b)
        assert (axes.py(a) > axes.py(b)) == (a < b)


def test_names_of_separate_points_do_not_cover_each_other():
    spots = [(0.1, 0.1), (0.5, 0.5), (0.9, 0.9), (0.1, 0.9), (0.9, 0.1)]
    crowd = [Point(f"adapter {i}", i, x, y, 0.02, 0.02) for i, (x, y) in enumerate(spots)]
    drawing = ElementTree.fromstring(scatter(crowd, scatter_axes(crowd, "x", "y"), "five"))
    boxes = [
        (float(e.get("x")), float(e.get("y")), len(e.text) * 6.1)
        for e in drawing.iter("text")
        if e.get("class") == "name"
    ]
    for i, (x, y, width) in enumerate(boxes):
        for other_x, other_y, other_width in boxes[:i]:
            apart = x + width <= other_x or other_x + other_width <= x or abs(y - other_y) >= 12
            assert apart


@given(
    values=st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=40),
    label=st.text("ab<&", min_size=1),
)
def test_curves_are_well_formed_and_leave_gaps_where_nothing_is_known(values, label):
    line = Line(label, 3, list(range(1, len(values) + 1)), values)
    drawing = ElementTree.fromstring(curves([line], curve_axes([line], "step", "loss"), "one"))
    path = next(e for e in drawing.iter("path") if e.get("class") == "line s3").get("d")
    assert len(re.findall("[ML]", path)) == sum(map(math.isfinite, values))


@given(n=st.integers(1, 700), level=st.floats(0.1, 9))
def test_smoothing_keeps_a_constant_and_the_length_of_the_run(n, level):
    line = smoothed(list(range(1, n + 1)), [level] * n, "run", 0)
    assert all(value == pytest.approx(level) for value in line.values)
    assert line.steps[0] == 1 and line.steps[-1] > 0.98 * n - 2
    assert len(line.steps) < 240


def test_smoothing_is_the_mean_of_the_neighbours():
    values = [float(i % 7) for i in range(100)]
    line = smoothed(list(range(100)), values, "run", 0)
    for i in (0, 3, 50, 99):
        window = values[max(0, i - 5) : i + 6]
        assert line.values[i] == pytest.approx(sum(window) / len(window))


def test_the_first_64_series_are_told_apart_by_shape_or_colour():
    drawn = {marker(series, "run", 0, 0) for series in range(64)}
    assert len(drawn) == 64


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.25, "0.25"), (-0.5, "−0.5"), (300, "300"), (2500, "2.5k")]
)
def test_axis_numbers_are_short(value, text):
    assert number(value) == text
