"""Image similarity against its definition, and the laws of a mean cosine."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.evaluate.image_similarity import image_similarity, image_similarity_within
from tests.strategies import seeds

sizes = st.integers(min_value=1, max_value=6)


def features(n: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, dtype=torch.float64, generator=rng)


def cosine_naive(a, b) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


@given(n=sizes, m=sizes, seed=seeds)
def test_matches_the_definition_over_all_pairs(n, m, seed):
    g_ND, d_MD = features(n, seed), features(m, seed + 1)
    pairs = [cosine_naive(g, d) for g in g_ND for d in d_MD]
    found = image_similarity(g_ND, d_MD)
    assert found.shape == (n,)
    torch.testing.assert_close(float(found.mean()), sum(pairs) / len(pairs))


@given(m=st.integers(2, 6), seed=seeds)
def test_within_a_set_leaves_out_each_image_itself(m, seed):
    d_MD = features(m, seed)
    pairs = [cosine_naive(d_MD[i], d_MD[j]) for i in range(m) for j in range(m) if i != j]
    found = image_similarity_within(d_MD)
    torch.testing.assert_close(float(found.mean()), sum(pairs) / len(pairs))


def test_one_image_has_no_other_to_resemble():
    assert math.isnan(float(image_similarity_within(features(1, 0))))


@given(n=sizes, m=sizes, seed=seeds, scale=st.floats(1e-3, 1e3))
def test_the_length_of_features_and_a_common_rotation_change_nothing(n, m, seed, scale):
    g_ND, d_MD = features(n, seed), features(m, seed + 1)
    rotation, _ = torch.linalg.qr(features(5, seed + 2))
    torch.testing.assert_close(
        image_similarity(scale * g_ND @ rotation, d_MD @ rotation), image_similarity(g_ND, d_MD)
    )


@given(n=sizes, m=sizes, seed=seeds)
def test_generated_and_dataset_play_the_same_part_in_the_mean(n, m, seed):
    g_ND, d_MD = features(n, seed), features(m, seed + 1)
    torch.testing.assert_close(
        image_similarity(g_ND, d_MD).mean(), image_similarity(d_MD, g_ND).mean()
    )


def test_copies_of_one_image_score_one_and_its_opposite_minus_one():
    d_MD = features(1, 3).repeat(4, 1)
    torch.testing.assert_close(image_similarity(2 * d_MD, d_MD), torch.ones(4).double())
    torch.testing.assert_close(image_similarity(-d_MD, d_MD), -torch.ones(4).double())
    torch.testing.assert_close(image_similarity_within(d_MD), torch.ones(4).double())
