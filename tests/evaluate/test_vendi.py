"""The Vendi score: its definition, and that it counts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.evaluate.vendi import Vendi, vendi
from tests.evaluate.fakes import noise_images
from tests.evaluate.test_image_similarity import cosine_naive, features
from tests.evaluate.views import view_of
from tests.strategies import seeds

sizes = st.integers(min_value=1, max_value=8)


def vendi_naive(x_ND) -> float:
    n = len(x_ND)
    k = np.array([[cosine_naive(x_ND[i], x_ND[j]) / n for j in range(n)] for i in range(n)])
    entropy = 0.0
    for eigenvalue in np.linalg.eigvals(k).real:
        if eigenvalue > 1e-14:
            entropy -= eigenvalue * math.log(eigenvalue)
    return math.exp(entropy)


@given(n=sizes, seed=seeds)
def test_matches_the_definition(n, seed):
    """Features have 5 dimensions, so n runs past the switch to the smaller matrix."""
    assert vendi(features(n, seed)) == pytest.approx(vendi_naive(features(n, seed)), rel=1e-6)


@given(n=st.integers(1, 40), seed=seeds)
def test_identical_images_count_as_one(n, seed):
    assert vendi(features(1, seed).repeat(n, 1)) == pytest.approx(1.0, abs=1e-9)


@given(n=st.integers(1, 40))
def test_orthogonal_images_count_in_full(n):
    assert vendi(torch.eye(n, 40)) == pytest.approx(n, rel=1e-9)


@given(clusters=st.integers(1, 8), copies=st.integers(1, 6))
def test_clusters_count_once_each(clusters, copies):
    assert vendi(torch.eye(clusters, 10).repeat(copies, 1)) == pytest.approx(clusters, rel=1e-9)


@given(n=sizes, seed=seeds, scale=st.floats(1e-3, 1e3))
def test_scale_rotation_order_and_duplicating_the_whole_set_change_nothing(n, seed, scale):
    x_ND = features(n, seed)
    rotation, _ = torch.linalg.qr(features(5, seed + 2))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for other in (scale * x_ND, x_ND @ rotation, x_ND[order], x_ND.repeat(3, 1)):
        assert vendi(other) == pytest.approx(vendi(x_ND), rel=1e-7)


@given(n=sizes, seed=seeds)
def test_lies_between_one_and_the_number_of_images(n, seed):
    assert 1.0 <= vendi(features(n, seed)) <= n


def test_alter_prompts_are_scored_one_by_one_and_the_others_together():
    """Two prompts with two equal images each: diverse as a set, not diverse under any prompt."""
    images = noise_images(2, 0).repeat(2, axis=0)
    prompts = ["at the beach", "at the beach", "at night", "at night"]

    def score(kind: str):
        return Vendi().measure(view_of(images, kind=kind, prompts=prompts))["vendi"]

    assert score("alter").values == pytest.approx((1.0, 1.0))
    assert score("alter").groups == ("at the beach", "at night")
    assert score("trigger").n == 1
    assert score("trigger").mean > 1.1
