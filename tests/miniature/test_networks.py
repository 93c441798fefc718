"""The judges' networks, with random weights: shapes, ranges, and what they must not depend on."""

import numpy as np
import pytest
import torch

from lyco_lab.miniature import judges as judging
from lyco_lab.miniature.networks import VOCABULARY, Embedder, Gram, Oracle
from lyco_lab.miniature.pretrain.labels import UNKNOWN, attribute_loss, labels
from lyco_lab.miniature.pretrain.material import to_pixels, to_tensor
from lyco_lab.miniature.vocabulary import Scene
from lyco_lab.miniature.world import pictures


def test_the_oracle_has_a_head_for_every_family():
    guesses = Oracle().eval()(torch.zeros(2, 3, 64, 64))
    assert {f: g.shape for f, g in guesses.items()} == {
        f: (2, len(v)) for f, v in VOCABULARY.items()
    }


def test_gram_features_halve_from_full_resolution():
    maps = Gram().features(torch.zeros(2, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (16, 64, 64), (32, 32, 32), (48, 16, 16), (64, 8, 8), (64, 4, 4),
    ]  # fmt: skip


def test_embeddings_projected_for_training_have_length_one():
    z = Embedder().eval()(torch.randn(3, 3, 64, 64))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = pictures(4, 0).pixels
    assert np.array_equal(to_pixels(to_tensor(pixels)), pixels)
    assert torch.equal(judging.to_input(pixels), to_tensor(pixels))


def test_other_sizes_are_brought_to_sixty_four():
    pixels = pictures(1, 0).pixels
    large = pixels.repeat(2, 1).repeat(2, 2)
    torch.testing.assert_close(judging.to_input(large), judging.to_input(pixels), atol=0.25, rtol=0)


def test_labels_know_what_is_hidden():
    scene = Scene({"kind": "toy", "background": "city", "style": "sketch", "position": "left",
                   "toy": "duck", "toy_color": "red", "pattern": "plain"})  # fmt: skip
    found = {f: int(v[0]) for f, v in labels([scene]).items()}
    assert found["toy"] == VOCABULARY["toy"].index("duck")
    assert found["toy_color"] == found["hair"] == UNKNOWN
    assert VOCABULARY["concept"][found["concept"]] == "none"


def test_the_attribute_loss_leaves_the_unknown_out():
    known = {"toy": torch.tensor([UNKNOWN, 1]), "object": torch.tensor([UNKNOWN, UNKNOWN])}
    guesses = {"toy": torch.zeros(2, 3), "object": torch.zeros(2, 5)}
    loss = attribute_loss(guesses, known, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(np.log(3))
    assert attribute_loss({"object": torch.zeros(1, 5)}, known, torch.tensor([0])) == 0
