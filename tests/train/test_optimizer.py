"""The schedule, clipping and averaging against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lyco_lab.config import Train
from lyco_lab.config.groups import Group, check
from lyco_lab.errors import UserError
from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.train.optimizer import (
    Average,
    Factor,
    build,
    clip,
    groups,
    norm,
    set_rates,
    weights,
)
from lyco_lab.train.schedule import share

ADAMW = OPTIMIZERS["adamw"]()


def factors(seed=0, sizes=((3, 4), (5,), (2, 2))):
    """Two factors of the UNet and one of the text encoder, with gradients."""
    rng = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(size, generator=rng)) for size in sizes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    places = [("unet", "down.0", "a_RQ"), ("unet", "down.0", "b_PR"), ("text_encoder", "q", "a_RQ")]
    return [Factor(*place, parameter) for place, parameter in zip(places, made, strict=True)]


def made_of(settings, rule, factors):
    return build(rule, groups(settings, rule, factors))


def set_all(optimizer, one):
    set_rates(optimizer, [one] * len(optimizer.param_groups))


def rates(optimizer):
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def clip_all(made, largest, settings=None):
    parameters = [f.parameter for f in made]
    found = float(norm(parameters, weights(settings or Train(), made)))
    clip(parameters, largest, found)
    return found


def test_the_rates_follow_their_share():
    settings = Train(lr=8.0, warmup_steps=4)
    optimizer = made_of(settings, ADAMW, factors())
    seen = []
    for step in range(7):
        set_all(optimizer, share(settings, step))
        seen.append(rates(optimizer)["unet"])
    assert seen == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0]
    set_all(optimizer, share(Train(warmup_steps=0), 0))
    assert rates(optimizer) == {"unet": 8.0, "text_encoder": 8.0}


def test_the_text_encoder_can_have_its_own_rate():
    optimizer = made_of(Train(lr=8.0, text_encoder_lr=2.0), ADAMW, factors())
    set_all(optimizer, share(Train(warmup_steps=20), 100))
    assert rates(optimizer) == {"unet": 8.0, "text_encoder": 2.0}


def test_groups_multiply_and_the_last_that_matches_holds():
    given = (
        Group(factors=("b_*",), lr=16.0, optimizer={"eps": 4.0}),
        Group(layers=("text_encoder.*",), lr=0.5, clip=2.0),
    )
    settings = Train(lr=8.0, text_encoder_lr=2.0, groups=given)
    made = factors()
    optimizer = made_of(settings, ADAMW, made)
    expected = {"unet": 8.0, "unet, group 1": 128.0, "text_encoder, group 2": 1.0}
    assert rates(optimizer) == expected
    eps = {group["name"]: group["eps"] for group in optimizer.param_groups}
    assert eps["unet, group 1"] == 4 * ADAMW.eps == 4 * eps["unet"]
    assert weights(settings, made) == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group(layers=("unet.dwn.*",), lr=2.0)], "matches no factor.*a_RQ, b_PR"),
        ([Group(factors=("c_*",), lr=2.0)], "matches no factor"),
        ([Group(factors=("b_*",), lr=2.0), Group(lr=3.0)], "group 1 .* decides nothing"),
    ],
)
def test_a_group_that_decides_nothing_is_an_error(groups, message):
    with pytest.raises(UserError, match=message):
        check(groups, [factor.place for factor in factors()])


@given(st.integers(0, 1000), st.floats(1e-3, 1e3) | st.none(), st.floats(0.25, 4.0))
def test_clipping_matches_its_definition(seed, largest, weight):
    made = factors(seed)
    settings = Train(groups=(Group(factors=("b_*",), clip=weight, lr=2.0),))
    before = [f.parameter.grad.clone() for f in made]
    weighed = [weight if f.name == "b_PR" else 1.0 for f in made]
    norm = math.sqrt(
        sum(float((w * g.double()).pow(2).sum()) for w, g in zip(weighed, before, strict=True))
    )
    assert clip_all(made, largest, settings) == pytest.approx(norm, rel=1e-5)
    factor = 1.0 if largest is None else min(1.0, largest / norm)
    for f, gradient in zip(made, before, strict=True):
        torch.testing.assert_close(f.parameter.grad, factor * gradient)


@given(st.integers(0, 1000), st.integers(-20, 20), st.floats(1e-2, 10.0))
def test_clipping_commutes_with_powers_of_two(seed, power, largest):
    scale = 2.0**power
    one, other = factors(seed), factors(seed)
    for f in other:
        f.parameter.grad *= scale
    assert clip_all(other, largest * scale) == scale * clip_all(one, largest)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(scale * a.parameter.grad, b.parameter.grad)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_one_step_matches_the_definition(kind):
    lr, decay = 0.1, 0.5
    made, rule = factors(), OPTIMIZERS[kind](weight_decay=decay)
    before = [f.parameter.detach().clone() for f in made]
    optimizer = made_of(Train(lr=lr, grad_clip=None), rule, made)
    set_all(optimizer, share(Train(warmup_steps=20), 100))
    optimizer.step()
    for old, factor in zip(before, made, strict=True):
        new = factor.parameter
        if kind == "sgd":
            expected = old - lr * (new.grad + decay * old)
        else:  # the first step of Adam is a step of one, whatever the gradient's size
            expected = old * (1 - lr * decay) - lr * new.grad / (new.grad.abs() + rule.eps)
        torch.testing.assert_close(new.detach(), expected)


def test_the_average_matches_its_definition():
    factors = {"a": nn.Parameter(torch.tensor([1.0, 2.0]))}
    average = Average(factors, decay=0.75)
    expected = torch.tensor([1.0, 2.0])
    for value in ([3.0, 4.0], [0.0, -8.0]):
        factors["a"].data = torch.tensor(value)
        average.update()
        expected = 0.75 * expected + 0.25 * torch.tensor(value)
    torch.testing.assert_close(average.values["a"], expected)


def test_swapping_the_average_twice_restores_every_bit():
    factors = {"a": nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))}
    average = Average(factors, decay=0.9)
    factors["a"].data *= 1.7
    average.update()
    raw, mean = factors["a"].detach().clone(), average.values["a"].clone()
    average.swap()
    assert torch.equal(factors["a"], mean) and torch.equal(average.values["a"], raw)
    average.swap()
    assert torch.equal(factors["a"], raw) and torch.equal(average.values["a"], mean)
