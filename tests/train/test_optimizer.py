"""The schedule, clipping and averaging against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lyco_lab.config import Train
from lyco_lab.train.optimizer import Average, build, clip, rates, set_rates


def groups(seed=0, sizes=((3, 4), (5,), (2, 2))):
    rng = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(size, generator=rng)) for size in sizes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    return {"unet": made[:2], "text_encoder": made[2:]}


def test_the_warm_up_is_linear_then_constant():
    optimizer = build(Train(lr=8.0, warmup_steps=4), groups())
    seen = []
    for step in range(7):
        set_rates(optimizer, step, warmup_steps=4)
        seen.append(rates(optimizer)["unet"])
    assert seen == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0]
    set_rates(optimizer, 0, warmup_steps=0)
    assert rates(optimizer) == {"unet": 8.0, "text_encoder": 8.0}


def test_the_text_encoder_can_have_its_own_rate():
    optimizer = build(Train(lr=8.0, text_encoder_lr=2.0), groups())
    set_rates(optimizer, 100, 20)
    assert rates(optimizer) == {"unet": 8.0, "text_encoder": 2.0}


@given(st.integers(0, 1000), st.floats(1e-3, 1e3) | st.none())
def test_clipping_matches_its_definition(seed, largest):
    optimizer = build(Train(), groups(seed))
    flat = [p for g in optimizer.param_groups for p in g["params"]]
    before = [p.grad.clone() for p in flat]
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in before))
    assert clip(optimizer, largest) == pytest.approx(norm, rel=1e-5)
    factor = 1.0 if largest is None else min(1.0, largest / norm)
    for parameter, gradient in zip(flat, before, strict=True):
        torch.testing.assert_close(parameter.grad, factor * gradient)


@given(st.integers(0, 1000), st.integers(-20, 20), st.floats(1e-2, 10.0))
def test_clipping_commutes_with_powers_of_two(seed, power, largest):
    scale = 2.0**power
    one, other = build(Train(), groups(seed)), build(Train(), groups(seed))
    for group in other.param_groups:
        for parameter in group["params"]:
            parameter.grad *= scale
    assert clip(other, largest * scale) == scale * clip(one, largest)
    for a, b in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert torch.equal(scale * p.grad, q.grad)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_one_step_matches_the_definition(kind):
    lr, decay = 0.1, 0.5
    settings = Train(optimizer=kind, lr=lr, weight_decay=decay, grad_clip=None)
    made = groups()
    before = [p.detach().clone() for p in made["unet"]]
    optimizer = build(settings, made)
    set_rates(optimizer, 100, 20)
    optimizer.step()
    for old, new in zip(before, made["unet"], strict=True):
        if kind == "sgd":
            expected = old - lr * (new.grad + decay * old)
        else:  # the first step of Adam is a step of one, whatever the gradient's size
            expected = old * (1 - lr * decay) - lr * new.grad / (new.grad.abs() + settings.eps)
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
