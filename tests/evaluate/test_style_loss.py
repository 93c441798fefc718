"""The style loss: its definition, and what it does and does not see."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.evaluate.base import gram
from lyco_lab.evaluate.style_loss import StyleLoss, style_loss
from tests.evaluate.fakes import noise_images
from tests.evaluate.test_base import gram_naive
from tests.evaluate.views import view_of
from tests.strategies import seeds


def layers(n: int, seed: int) -> list[torch.Tensor]:
    """Feature maps of two layers of different size."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(n, 2, 3, 3), (n, 3, 2, 2)]
    return [torch.randn(shape, dtype=torch.float64, generator=rng) for shape in shapes]


def style_loss_naive(maps, maps_base) -> list[float]:
    totals = []
    for i in range(len(maps[0])):
        total = 0.0
        for psi, psi_base in zip(maps, maps_base, strict=True):
            g, g_base = gram_naive(psi[i]), gram_naive(psi_base[i])
            for a, b in zip(g.flatten().tolist(), g_base.flatten().tolist(), strict=True):
                total += (a - b) ** 2
        totals.append(total)
    return totals


@given(n=st.integers(1, 3), seed=seeds)
def test_matches_the_definition(n, seed):
    maps, maps_base = layers(n, seed), layers(n, seed + 1)
    found = style_loss([gram(p) for p in maps], [gram(p) for p in maps_base])
    expected = torch.tensor(style_loss_naive(maps, maps_base)).double()
    torch.testing.assert_close(found, expected)


@given(n=st.integers(1, 3), seed=seeds)
def test_a_set_against_itself_is_zero_and_pairs_can_be_swapped(n, seed):
    here = [gram(p) for p in layers(n, seed)]
    there = [gram(p) for p in layers(n, seed + 1)]
    assert style_loss(here, here).abs().max() == 0
    torch.testing.assert_close(style_loss(here, there), style_loss(there, here))


@given(n=st.integers(1, 3), seed=seeds)
def test_moving_pixels_about_changes_nothing(n, seed):
    """Gram matrices forget where a feature was: that is why they stand for style."""
    maps = layers(n, seed)
    moved = [psi.flatten(2).flip(2).view_as(psi) for psi in maps]
    loss = style_loss([gram(p) for p in maps], [gram(p) for p in moved])
    assert float(loss.max()) == pytest.approx(0.0, abs=1e-20)


@given(n=st.integers(1, 3), seed=seeds)
def test_doubling_all_features_multiplies_the_loss_by_sixteen(n, seed):
    maps, maps_base = layers(n, seed), layers(n, seed + 1)
    once = style_loss([gram(p) for p in maps], [gram(p) for p in maps_base])
    twice = style_loss([gram(2 * p) for p in maps], [gram(2 * p) for p in maps_base])
    torch.testing.assert_close(twice, 16 * once)


def test_each_image_is_compared_with_its_own_partner():
    images, base = noise_images(3, 0), noise_images(3, 1)
    base[1] = images[1]
    score = StyleLoss().measure(view_of(images, real=images, base=base))["style_loss"]
    assert score.values[1] == 0
    assert min(score.values[0], score.values[2]) > 0


def test_without_partners_there_is_no_style_loss():
    assert StyleLoss().measure(view_of(np.zeros((2, 8, 8, 3), np.uint8))) == {}
