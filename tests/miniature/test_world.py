"""Pictures: deterministic, and showing what they claim."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyco_lab.miniature.styles import STYLES, _spread
from lyco_lab.miniature.vocabulary import BASE, RGB, Scene, sample
from lyco_lab.miniature.world import contact_sheet, pictures, render

seeds = st.integers(0, 2**32)
FLAT = {"style": "flat", "background": "plain", "position": "center"}


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_the_same_seed_draws_the_same_pixels(seed):
    scene = sample(random.Random(seed))
    one, other = (render(scene, random.Random(seed)) for _ in range(2))
    assert one.shape == (64, 64, 3) and one.dtype == np.uint8
    assert np.array_equal(one, other)


def test_picture_i_does_not_depend_on_how_many_are_drawn():
    few, many = pictures(3, seed=5), pictures(7, seed=5)
    assert few.scenes == many.scenes[:3]
    assert np.array_equal(few.pixels, many.pixels[:3])
    assert not np.array_equal(few.pixels, pictures(3, seed=6).pixels)


def middle(scene, seed):
    """Where the pixels differ from the same scene's empty plain background, on average, in x."""
    blank = Scene({"kind": "scene", "background": "plain", "style": "flat"})
    drawn, empty = (render(s, random.Random(seed)).astype(int) for s in (scene, blank))
    weight = np.abs(drawn - empty).sum((0, 2))
    return float((weight * np.arange(64)).sum() / weight.sum())


@settings(max_examples=25, deadline=None)
@given(seed=seeds, kind=st.sampled_from(["character", "person", "toy", "object"]))
def test_position_is_where_the_subject_stands(seed, kind):
    base = sample(random.Random(seed), kind).attributes
    at = [middle(Scene({**base, **FLAT, "position": p}), seed) for p in BASE["position"]]
    assert at[0] < 26 < at[1] < 38 < at[2]


def near(picture, color, tolerance=30):
    """Share of pixels within `tolerance` of a colour, in each channel."""
    return float((np.abs(picture.astype(int) - color).max(2) < tolerance).mean())


@pytest.mark.parametrize("color", BASE["object_color"])
def test_an_object_has_the_colour_that_its_caption_says(color):
    scene = Scene({"kind": "object", "object": "car", "object_color": color, **FLAT})
    shares = {c: near(render(scene, random.Random(1)), RGB[c]) for c in BASE["object_color"]}
    assert max(shares, key=shares.get) == color
    assert shares[color] > 0.08


@pytest.mark.parametrize("family", sorted(set(BASE) - {"kind", "position", "style"}))
def test_every_value_of_a_family_looks_different(family):
    """Changing one attribute, with every other choice the same, changes a good many pixels."""
    kind = next(
        k
        for k in ("character", "toy", "object")
        if family in sample(random.Random(0), k).attributes
    )
    base = {**sample(random.Random(4), kind).attributes, **FLAT}
    drawn = {v: render(Scene({**base, family: v}), random.Random(2)) for v in BASE[family]}
    values = list(drawn)
    for i, one in enumerate(values):
        for other in values[:i]:
            changed = (np.abs(drawn[one].astype(int) - drawn[other]).max(2) > 24).mean()
            assert changed > 0.004, (one, other)


def test_edges_are_smoothed():
    """Averaging sixteen samples per pixel leaves colours that no brush has."""
    scene = Scene({"kind": "object", "object": "ball", "object_color": "red", **FLAT})
    colors = np.unique(render(scene, random.Random(0)).reshape(-1, 3), axis=0)
    assert len(colors) > 20


@given(seed=seeds)
def test_spread_is_the_range_over_windows(seed):
    a = np.random.default_rng(seed).integers(0, 256, (9, 7, 2), dtype=np.uint8)
    for k in (1, 2):
        padded = np.pad(a, [(k, k), (k, k), (0, 0)], mode="edge")
        for y in range(9):
            for x in range(7):
                window = padded[y : y + 2 * k + 1, x : x + 2 * k + 1].astype(int)
                expected = window.max((0, 1)) - window.min((0, 1))
                assert np.array_equal(_spread(a, k)[y, x], expected)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_every_style_is_unlike_the_flat_picture(style):
    base = {**sample(random.Random(7), "character").attributes, "background": "beach"}
    flat = render(Scene({**base, "style": "flat"}), random.Random(3)).astype(int)
    styled = render(Scene({**base, "style": style}), random.Random(3))
    assert (np.abs(styled - flat).mean() > 4) == (style != "flat")
    if style == "sketch":
        assert np.ptp(styled, axis=2).max() == 0


def test_a_contact_sheet_holds_every_picture():
    row = list(pictures(3, 0).pixels)
    sheet = np.asarray(contact_sheet([row, row[:1]], scale=1))
    assert sheet.shape == (132, 198, 3)
    assert np.array_equal(sheet[66:130, :64], row[0])
    assert np.array_equal(sheet[:64, 132:196], row[2])
