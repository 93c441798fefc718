"""The pretraining loop: resuming changes nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lyco_lab.miniature.pretrain.fit import Average, Schedule, fit
from lyco_lab.seeds import generator


class Killed(Exception):
    pass


def problem(die_at=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def loss(step):
        if step == die_at:
            raise Killed
        x = torch.randn(16, 4, generator=generator(0, "fit", step))
        return ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()

    return model, loss


@pytest.mark.parametrize("die_at", [1, 10, 13, 29])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_killed_run_ends_at_the_same_weights(tmp_path, die_at, ema):
    schedule = Schedule(steps=30, lr=1e-2, warmup=5)
    quiet = {"ema": ema, "save_every": 5, "say": lambda text: None}
    whole, loss = problem()
    fit("x", tmp_path / "whole", whole, loss, schedule, **quiet)
    model, loss = problem(die_at)
    with pytest.raises(Killed):
        fit("x", tmp_path / "killed", model, loss, schedule, **quiet)
    model, loss = problem()
    fit("x", tmp_path / "killed", model, loss, schedule, **quiet)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_finished_part_is_read_and_not_trained_again(tmp_path):
    schedule = Schedule(steps=6, lr=1e-2)
    first, loss = problem()
    fit("x", tmp_path, first, loss, schedule, say=lambda text: None)
    again, loss = problem(die_at=0)
    fit("x", tmp_path, again, loss, schedule, say=lambda text: None)
    assert torch.equal(first[0].weight, again[0].weight)


def test_a_loss_that_is_not_finite_stops_it(tmp_path):
    model, _ = problem()
    with pytest.raises(FloatingPointError, match="x: the loss is nan at step 0"):
        fit("x", tmp_path, model, lambda step: model[0].weight.sum() * float("nan"),
            Schedule(steps=3, lr=1e-2), say=lambda text: None)  # fmt: skip


@given(
    steps=st.integers(10, 1000),
    decay_from=st.floats(0, 0.9),
    step=st.floats(0, 1, exclude_max=True),
)
def test_the_schedule_rises_stays_and_falls(steps, decay_from, step):
    schedule = Schedule(steps=steps, lr=2.0, warmup=5, decay_from=decay_from, floor=0.1)
    at = int(step * steps)
    assert 0 < schedule.at(at) <= 2.0
    if 5 <= at <= decay_from * steps:
        assert schedule.at(at) == 2.0
    assert schedule.at(steps) == pytest.approx(0.2)


def test_the_average_is_the_written_out_sum():
    model, _ = problem()
    average = Average(model, decay=0.5)
    expected = model[0].weight.detach().clone()
    for step in range(8):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        average.update(model, step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * model[0].weight
    torch.testing.assert_close(average.state["0.weight"], expected.detach())
