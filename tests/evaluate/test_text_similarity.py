"""Text similarity: one image against one text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.evaluate.text_similarity import TextSimilarity, text_similarity
from tests.evaluate.fakes import FakeJudges, noise_images
from tests.evaluate.test_image_similarity import cosine_naive, features
from tests.evaluate.views import view_of
from tests.strategies import seeds


@given(n=st.integers(1, 6), seed=seeds)
def test_matches_the_definition_one_to_one(n, seed):
    x_ND, t_ND = features(n, seed), features(n, seed + 1)
    expected = [cosine_naive(x, t) for x, t in zip(x_ND, t_ND, strict=True)]
    torch.testing.assert_close(text_similarity(x_ND, t_ND), torch.tensor(expected).double())


def test_every_image_needs_its_own_text():
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(2, 5\)"):
        text_similarity(features(3, 0), features(2, 0))


def test_repeated_texts_find_their_own_images():
    """Each text is encoded once; a value must not depend on which others are in the set."""
    images, judges = noise_images(4, 0), FakeJudges()
    texts = ["a bear", "a duck", "a bear", "a car"]
    found = TextSimilarity().measure(view_of(images, texts=texts))["text_similarity"]
    for i, text in enumerate(texts):
        alone = float(judges.clip_image(images)[i] @ judges.clip_text([text])[0])
        assert found.values[i] == pytest.approx(alone)
