"""What is special to one optimizer."""

import lion_pytorch
import pytest
import torch
from torch import nn

from lyco_lab.errors import UserError
from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.optimizers.adafactor import Adafactor
from lyco_lab.optimizers.adamw8bit import AdamW8bit
from lyco_lab.optimizers.asgd import ASGD
from lyco_lab.optimizers.base import Group
from lyco_lab.optimizers.lion import Lion
from lyco_lab.optimizers.muon import Muon
from lyco_lab.optimizers.prodigy import Prodigy
from lyco_lab.optimizers.radam import RAdam
from lyco_lab.optimizers.schedulefree import ScheduleFree


def gradients(shape, steps=20, size=1.0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return [size * torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)] * 2 + [
        size * torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        for _ in range(steps - 2)
    ]


def trained(make, shape, gradients, dtype=torch.float32, rate=lambda step: 1.0):
    """Where each step leads, from ones."""
    factor = nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer, path = make(factor), []
    lr = optimizer.param_groups[0]["lr"]
    for step, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = lr * rate(step)
        factor.grad = gradient.clone()
        optimizer.step()
        path.append(factor.detach().clone())
    return torch.stack(path)


def ours(rule, lr):
    return lambda factor: rule.build([Group("a", [factor], lr, rule)])


def test_lion_is_the_independent_one():
    rule = Lion(betas=(0.8, 0.95), weight_decay=0.3)
    given = gradients((5, 4), dtype=torch.float64)
    here = trained(ours(rule, 0.01), (5, 4), given, torch.float64)
    there = trained(
        lambda p: lion_pytorch.Lion([p], lr=0.01, betas=(0.8, 0.95), weight_decay=0.3),
        (5, 4),
        given,
        torch.float64,
    )
    torch.testing.assert_close(here, there, rtol=0, atol=1e-15)


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
def test_radam_changes_phase_where_torch_does(beta2):
    """A step without rectification is proportional to the gradient, a later one is not."""
    rule = RAdam(betas=(0.9, beta2))
    given = gradients((4,), 12, dtype=torch.float64)
    single = trained(ours(rule, 0.1), (4,), given, torch.float64)
    double = trained(ours(rule, 0.1), (4,), [2 * g for g in given], torch.float64)
    steps = [
        path.diff(dim=0, prepend=torch.ones(1, 4, dtype=path.dtype)) for path in (single, double)
    ]
    linear = [torch.allclose(2 * one, two) for one, two in zip(*steps, strict=True)]
    marked = [RAdam(betas=(0.9, beta2), unrectified_lr=0.5).rate(step) == 0.5 for step in range(12)]
    assert linear == marked
    assert sum(marked) == 5


def test_radam_without_its_first_steps_waits():
    rule = RAdam(unrectified_lr=0.0)
    path = trained(ours(rule, 0.1), (4,), gradients((4,)), rate=rule.rate)
    assert torch.equal(path[:5], torch.ones(5, 4))
    assert (path[5] != 1).all()


@pytest.mark.parametrize("shape", [(6, 5), (7,)])
@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_adafactor_is_the_papers_without_its_floors(shape, size):
    """Gradients as small as 1e-8 are still followed as they are: torch's default eps1 is not."""
    rule = Adafactor(eps2=0.01, weight_decay=0.1)
    given = gradients(shape, size=size)
    here = trained(ours(rule, 0.05), shape, given)

    theta = torch.ones(shape, dtype=torch.float64)
    rows = columns = square = 0.0
    for step, gradient in enumerate(given, start=1):
        g, b = gradient.double(), step**-0.8
        size_of = theta.square().mean().sqrt()
        theta = theta * (1 - 0.05 * 0.1)
        if len(shape) == 2:
            rows = rows + b * (g.square().mean(1) - rows)
            columns = columns + b * (g.square().mean(0) - columns)
            square = rows[:, None] * columns[None, :] / rows.mean()
        else:
            square = square + b * (g.square() - square)
        update = g / square.sqrt()
        update = update / max(1.0, update.square().mean().sqrt())
        theta = theta - max(0.01, size_of) * min(0.05, step**-0.5) * update
        torch.testing.assert_close(here[step - 1].double(), theta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"d0": 1e-3}, "one d0 for all factors, got 1e-06 and 0.001"),
        ({"betas": (0.5, 0.9)}, "one betas for all factors"),
        ({"growth_rate": 2.0}, "one growth_rate for all factors"),
    ],
)
def test_prodigy_refuses_groups_that_its_package_would_ignore(other, message):
    factors = [nn.Parameter(torch.ones(2, 2)) for _ in "ab"]
    groups = [
        Group("a", factors[:1], 1.0, Prodigy()),
        Group("b", factors[1:], 1.0, Prodigy(**other)),
    ]
    with pytest.raises(UserError, match=message):
        Prodigy().build(groups)


def test_prodigy_takes_one_learning_rate_or_none():
    factors = [nn.Parameter(torch.ones(2, 2)) for _ in "ab"]
    rule = Prodigy(eps=1e-4)

    def groups(lr):
        second = Prodigy(eps=1e-6, weight_decay=0.1)
        return [Group("a", factors[:1], 1.0, rule), Group("b", factors[1:], lr, second)]

    rule.build(groups(0.0)), rule.build(groups(1.0))
    with pytest.raises(UserError, match="one learning rate for all.*got 1 and 0.5"):
        rule.build(groups(0.5))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_building_prints_nothing(kind, capsys):
    rule = OPTIMIZERS[kind]()
    rule.build([Group("a", [nn.Parameter(torch.ones(2, 2))], 1.0, rule)])
    assert capsys.readouterr().out == ""


def test_muon_makes_singular_values_alike():
    rng = torch.Generator().manual_seed(0)
    gradient = torch.randn(6, 9, generator=rng)
    (after,) = trained(ours(Muon(weight_decay=0.0), 1.0), (6, 9), [gradient])
    values = torch.linalg.svdvals(1 - after)
    assert torch.linalg.svdvals(gradient).max() > 3 * torch.linalg.svdvals(gradient).min()
    assert values.min() > 0.5 and values.max() < 1.3


def test_small_factors_keep_their_state_in_32_bits():
    rule = AdamW8bit()
    factors = [nn.Parameter(torch.ones(64, side)) for side in (63, 64)]
    optimizer = rule.build([Group("a", factors, 0.1, rule)])
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    optimizer.step()
    assert [optimizer.state[f]["state1"].dtype for f in factors] == [torch.float32, torch.uint8]


@pytest.mark.parametrize("t0", [0.0, 3.0])
def test_asgd_gives_the_mean_of_where_it_was(t0):
    rule = ASGD(t0=t0, lambd=0.0)
    factor = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer, path = ours(rule, 0.1)(factor), []
    for gradient in gradients((4,), dtype=torch.float64):
        factor.grad = gradient
        optimizer.step()
        path.append(factor.detach().clone())
    optimizer.eval()
    torch.testing.assert_close(factor.detach(), torch.stack(path[int(t0) + 1 :]).mean(0))
    optimizer.train()
    assert torch.equal(factor.detach(), path[-1])


def test_schedulefree_gives_the_mean_of_its_leading_sequence():
    """With a constant learning rate, x is the mean of all z."""
    rule = ScheduleFree(weight_decay=0.0)
    factor = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer, path = ours(rule, 0.1)(factor), []
    for gradient in gradients((4,), dtype=torch.float64):
        factor.grad = gradient.clone()
        optimizer.step()
        path.append(optimizer.state[factor]["z"].clone())
    optimizer.eval()
    torch.testing.assert_close(factor.detach(), torch.stack(path).mean(0))
