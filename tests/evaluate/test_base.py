"""Scores: what their mean and standard error say, and encoding in batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.evaluate import base
from lyco_lab.evaluate.base import Encoded, Score, gram, unit
from tests.evaluate.fakes import FakeJudges, noise_images
from tests.strategies import seeds

values = st.lists(
    st.one_of(st.floats(-10, 10), st.just(math.nan)),
    min_size=1,
    max_size=12,
)


def standard_error_naive(values: list[float], groups: list[str]) -> float:
    means = []
    for group in sorted(set(groups)):
        mine = [v for v, g in zip(values, groups, strict=True) if g == group and not math.isnan(v)]
        if mine:
            means.append(sum(mine) / len(mine))
    if len(means) == 1:
        means = [v for v in values if not math.isnan(v)]
    k = len(means)
    if k < 2:
        return math.nan
    centre = sum(means) / k
    return math.sqrt(sum((m - centre) ** 2 for m in means) / (k - 1)) / math.sqrt(k)


@given(values=values, seed=seeds)
def test_mean_and_standard_error_match_their_definitions(values, seed):
    groups = [f"p{i}" for i in np.random.default_rng(seed).integers(0, 4, len(values))]
    score = Score(tuple(values), tuple(groups), "image")
    known = [v for v in values if not math.isnan(v)]
    assert score.n == len(known)
    np.testing.assert_allclose(score.mean, sum(known) / len(known) if known else math.nan)
    expected = standard_error_naive(values, groups)
    np.testing.assert_allclose(score.standard_error, expected, atol=1e-9)


def test_repeating_a_prompts_images_adds_no_certainty():
    once = Score((0.1, 0.5, 0.9), ("a", "b", "c"), "image")
    thrice = Score(once.values * 3, once.groups * 3, "image")
    assert thrice.standard_error == pytest.approx(once.standard_error)


def test_a_number_about_the_whole_set_has_no_standard_error():
    assert math.isnan(Score((3.2,), ("",), "set").standard_error)


def gram_naive(psi_CHW):
    c, h, w = psi_CHW.shape
    out = torch.zeros(c, c, dtype=torch.float64)
    for i in range(c):
        for j in range(c):
            for y in range(h):
                for x in range(w):
                    out[i, j] += psi_CHW[i, y, x] * psi_CHW[j, y, x]
    return out / (c * h * w)


@given(seed=seeds, n=st.integers(1, 3), c=st.integers(1, 3), h=st.integers(1, 3))
def test_gram_matches_the_definition(seed, n, c, h):
    rng = torch.Generator().manual_seed(seed)
    psi_NCHW = torch.randn(n, c, h, h + 1, dtype=torch.float64, generator=rng)
    expected = torch.stack([gram_naive(psi_CHW) for psi_CHW in psi_NCHW])
    torch.testing.assert_close(gram(psi_NCHW), expected)


def test_unit_rows_have_length_one_and_zero_stays_zero():
    x_ND = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(x_ND, torch.tensor([[0.6, 0.8], [0.0, 0.0]]).double())


def test_batches_change_nothing(monkeypatch):
    images = noise_images(7, 3)
    whole = Encoded(images, FakeJudges())
    monkeypatch.setattr(base, "BATCH_IMAGES", 3)
    parts = Encoded(images, FakeJudges())
    torch.testing.assert_close(parts.features_ND, whole.features_ND)
    torch.testing.assert_close(parts.clip_ND, whole.clip_ND)
    torch.testing.assert_close(parts.grams, whole.grams)
    assert parts.readings == whole.readings
    assert {len(found) for found in parts.readings.values()} == {7}
