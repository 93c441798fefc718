"""Sizes of images: bounds that hold for all, and the largest share of each image."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.data.buckets import Sizing, fit, shown
from lyco_lab.errors import UserError

PAPER = Sizing(512, 512, (320, 960, 64))
sides = st.integers(1, 5000)


@st.composite
def sizings(draw, upscale=None):
    step = draw(st.sampled_from([8, 16, 64]))
    least = step * draw(st.integers(1, 6))
    most = least + step * draw(st.integers(0, 12))
    side = max(least, draw(st.integers(least, 1200)))
    upscale = draw(st.booleans()) if upscale is None else upscale
    return Sizing(side, side, (least, most, step), upscale)


def naive(sizing, width, height):
    """Of all sizes that are allowed and cannot grow in one direction, the one that shows most."""
    least, most, step = sizing.buckets
    fits = [
        (w, h)
        for w in range(least, most + 1, step)
        for h in range(least, most + 1, step)
        if w * h <= sizing.area and (sizing.upscale or (w <= width and h <= height))
    ]
    full = [(w, h) for w, h in fits if (w + step, h) not in fits or (w, h + step) not in fits]
    return max((shown(width, height, size) for size in full), default=None)


@given(sizings(), sides, sides)
def test_a_bucket_keeps_all_bounds_and_shows_the_most(sizing, width, height):
    size = sizing.one(width, height)
    least, most, step = sizing.buckets
    best = naive(sizing, width, height)
    if size is None:
        assert best is None and not sizing.upscale
        return
    w, h = size
    assert w % step == h % step == 0 and least <= min(w, h) and max(w, h) <= most
    assert w * h <= sizing.area
    assert sizing.upscale or (w <= width and h <= height)
    assert shown(width, height, size) == pytest.approx(best)


@given(sizings(), sides, sides)
def test_an_image_and_its_mirror_image_on_the_diagonal_get_mirrored_buckets(sizing, width, height):
    size, turned = sizing.one(width, height), sizing.one(height, width)
    if size is None or turned is None:
        assert size is turned is None
    else:
        assert shown(width, height, size) == pytest.approx(shown(height, width, turned))


@given(sizings(), sides, sides)
def test_resizing_covers_the_bucket_by_less_than_a_pixel_more_than_needed(sizing, width, height):
    size = sizing.one(width, height)
    if size is None:
        return
    how = fit(width, height, size)
    scale = max(size[0] / width, size[1] / height)
    assert size[0] in how.resized[:1] or size[1] in how.resized[1:]
    for side, whole, resized, corner in zip(
        size, (width, height), how.resized, how.corner, strict=True
    ):
        assert resized >= side and abs(resized - scale * whole) <= 0.5 + 1e-9
        assert corner == (resized - side) // 2
    assert sizing.upscale or scale <= 1
    left, top = how.corner
    assert how.seen(False) == how.corner
    assert how.seen(True) == (how.resized[0] - size[0] - left, top)


def test_the_paper_s_buckets():
    assert PAPER.sizes == [
        (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
        (576, 448), (640, 384), (704, 320), (768, 320),
    ]  # fmt: skip
    assert PAPER.one(512, 512) == (512, 512)
    assert PAPER.one(1500, 1000) == (640, 384)
    assert PAPER.one(500, 500) == (448, 448)  # not enlarged
    assert PAPER.one(319, 2000) is None
    assert Sizing(512, 512, (320, 960, 64), upscale=True).one(50, 50) == (512, 512)


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=20))
def test_many_images_are_assigned_as_one_by_one(images):
    width, height = (np.array(column, np.int32) for column in zip(*images, strict=True))
    one_by_one = [PAPER.one(w, h) or (0, 0) for w, h in images]
    assert PAPER.assign(width, height).tolist() == [list(size) for size in one_by_one]


def test_without_buckets_all_have_one_size():
    assert Sizing(64, 96).one(64, 96) == (64, 96)
    assert Sizing(64, 96).one(63, 960) is None
    assert Sizing(64, 96, upscale=True).one(63, 960) == (64, 96)


@given(sides, sides, sides, sides)
def test_the_share_that_is_shown(width, height, w, h):
    expected = math.exp(-abs(math.log(width / height) - math.log(w / h)))
    assert shown(width, height, (w, h)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sizing(512, 512, (320, 960, 60)), "the step of buckets is 60"),
        (lambda: Sizing(512, 512, (300, 960, 64)), r"buckets are \[300, 960, 64\]"),
        (lambda: Sizing(512, 512, (576, 960, 64)), "the smallest bucket, 576 x 576, has more"),
        (lambda: Sizing(500, 512), "images of 500 x 512 pixels are asked for"),
        (lambda: Sizing(0, 512), "images of 0 x 512 pixels are asked for"),
    ],
)
def test_sizes_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()
