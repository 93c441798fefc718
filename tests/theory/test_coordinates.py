"""Coordinates: what is said of alpha, the learning rates and the start, on LoRA as it trains."""

import pytest
import torch
from hypothesis import given

from lyco_lab.adapters import ADAPTERS
from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.optimizers.base import Group
from tests.strategies import random_weight, seeds
from theory import is_zero
from theory.coordinates import SPACES, Space, complete, constant, sufficient

SHAPE = (6, 8)


def updates(seed, kind="adamw", *, alpha=1.0, lr_B=1.0, lr_A=1.0, sigma_A=1.0):
    """W' - W after each of five steps of LoRA from B = 0; the settings as multiples."""
    adapter = ADAPTERS["lora"](rank=2, alpha=alpha)
    weight = random_weight(SHAPE, seed)
    factors = adapter.init(weight, torch.Generator().manual_seed(seed))
    factors["a_RQ"] *= sigma_A
    leaves = {name: torch.nn.Parameter(A) for name, A in factors.items()}
    rule = OPTIMIZERS[kind](**({"eps": 0.0} if kind == "adamw" else {}), weight_decay=0.0)
    lr = {"b_PR": 0.125 * lr_B, "a_RQ": 0.125 * lr_A}
    optimizer = rule.build(Group(name, [A], lr[name], rule) for name, A in leaves.items())
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        change = adapter.delta(weight, leaves)
        (weight + change).sin().exp().sum().backward()
        # Where B is 0 so is the gradient of A, and 0 / 0 is no step without eps.
        if not leaves["a_RQ"].grad.any():
            leaves["a_RQ"].grad = None
        optimizer.step()
        found.append(adapter.delta(weight, leaves).detach())
    return torch.stack(found)


@given(seed=seeds)
def test_alpha_is_a_learning_rate_ratio_or_both_rates_and_the_start(seed):
    alpha = updates(seed, alpha=4)
    assert torch.equal(alpha, updates(seed, lr_B=4))
    assert torch.equal(alpha, updates(seed, lr_B=2, lr_A=2, sigma_A=2))
    for other in ({"lr_B": 2, "lr_A": 2}, {"lr_B": 4, "lr_A": 4}, {"sigma_A": 4}):
        assert not torch.allclose(alpha, updates(seed, **other))


@given(seed=seeds)
def test_under_sgd_the_ratio_is_gamma_squared(seed):
    alpha = updates(seed, "sgd", alpha=0.25)
    assert torch.equal(alpha, updates(seed, "sgd", lr_B=1 / 16))
    assert not torch.allclose(alpha, updates(seed, "sgd", lr_B=1 / 4))


@pytest.mark.parametrize("name", SPACES)
def test_a_power_that_is_wrong_is_caught(name):
    space = SPACES[name]
    assert all(identity.holds() for identity in constant(space))
    assert is_zero(sufficient(space))
    moved = space.moved

    class Wrong(Space):
        def moved(self, s):
            return {x: by * s["B"] if str(x) == "lr_B" else by for x, by in moved(s).items()}

    if "B" in space.factors:
        wrong = Wrong(space.factors, space.zero, space.powers)
        assert [identity.holds() for identity in constant(wrong)].count(False) >= 2
        assert not is_zero(sufficient(wrong))


def test_what_counts_is_all_that_counts():
    class Fewer(Space):
        def invariants(self):
            kept = super().invariants()
            kept.pop("gamma")
            return kept

    space = SPACES["LoRA, AdamW"]
    assert complete(space) == 0
    assert complete(Fewer(space.factors, space.zero, space.powers)) == 1
