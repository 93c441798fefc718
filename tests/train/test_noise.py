"""Timesteps and noise: their distributions, and that nothing but the step and the place decides."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.config import Train
from lyco_lab.data.batches import Batch, Order
from lyco_lab.diffusion.model import Sizes
from lyco_lab.diffusion.objective import Epsilon, Flow
from lyco_lab.errors import UserError
from lyco_lab.seeds import generator
from lyco_lab.train import noise

T = 100
EPSILON = Epsilon(torch.linspace(0.99, 0.01, T))
FLOW = Flow.shifted(T, 3.0)
SIDES = (4, 8, 6)  # channels, height, width

ALL = [
    (Train(noise_offset=0.1), EPSILON),
    (Train(multires_noise_iterations=3), EPSILON),
    (Train(multires_noise_iterations=6, multires_noise_discount=0.8), EPSILON),
    (Train(input_perturbation=0.1), EPSILON),
    (Train(min_timestep=20, max_timestep=60), EPSILON),
    (Train(timestep_sampling="logit_normal"), FLOW),
    (Train(timestep_sampling="logit_normal", logit_mean=1.0, logit_std=0.5, min_timestep=9), FLOW),
    (Train(noise_offset=0.2, input_perturbation=0.3, max_timestep=7), FLOW),
]
settings_of_all = pytest.mark.parametrize(("settings", "objective"), ALL)


def plain(order, step):
    """A batch as the data layer draws it, of latents that do not matter here."""
    ours = slice(order.rank * order.batch_size, (order.rank + 1) * order.batch_size)
    size = (order.together, *SIDES)
    return Batch(
        step=step,
        indices_B=torch.zeros(order.batch_size, dtype=torch.int64),
        latents_BCHW=torch.zeros(order.batch_size, *SIDES),
        noise_BCHW=torch.randn(size, generator=generator(order.seed, "noise", step, 0))[ours],
        timesteps_B=torch.randint(
            T, (order.together,), generator=generator(order.seed, "timestep", step, 0)
        )[ours],
        sizes=Sizes.whole(64, 64, order.batch_size),
        text={},
    )


def drawn(settings, objective, batch_size=6, step=0, seed=0, rank=0, ranks=1):
    order = Order((1,), batch_size, seed, rank, ranks)
    return noise.drawn(settings, objective, plain(order, step), order)


def tensors(batch):
    found = {"noise": batch.noise_BCHW, "timesteps": batch.timesteps_B}
    if batch.perturbation_BCHW is not None:
        found["perturbation"] = batch.perturbation_BCHW
    return found


def test_nothing_asked_for_is_nothing_changed():
    order = Order((1,), 6, 0)
    batch = plain(order, 3)
    assert noise.drawn(Train(), EPSILON, batch, order) is batch


def test_bounds_that_exclude_nothing_change_no_bit():
    bounded = drawn(Train(min_timestep=0, max_timestep=T), EPSILON)
    assert torch.equal(bounded.timesteps_B, drawn(Train(), EPSILON).timesteps_B)


@settings_of_all
def test_each_setting_changes_what_it_is_about_and_nothing_else(settings, objective):
    before, after = drawn(Train(), objective), drawn(settings, objective)
    timed = settings.timestep_sampling != "uniform" or settings.min_timestep is not None
    timed = timed or settings.max_timestep is not None
    noised = settings.noise_offset is not None or settings.multires_noise_iterations is not None
    assert torch.equal(before.timesteps_B, after.timesteps_B) != timed
    assert torch.equal(before.noise_BCHW, after.noise_BCHW) != noised
    assert (after.perturbation_BCHW is not None) == (settings.input_perturbation is not None)


@settings_of_all
def test_every_step_and_seed_draws_anew_and_the_same_again(settings, objective):
    first = tensors(drawn(settings, objective, step=5))
    for name, tensor in tensors(drawn(settings, objective, step=5)).items():
        assert torch.equal(tensor, first[name])
    for other in ({"step": 6}, {"step": 5, "seed": 1}):
        for name, tensor in tensors(drawn(settings, objective, **other)).items():
            assert not torch.equal(tensor, first[name]), name


@settings_of_all
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_draw_the_parts_of_what_one_draws(settings, objective, ranks):
    whole = tensors(drawn(settings, objective, step=2))
    size = {"batch_size": 6 // ranks, "step": 2, "ranks": ranks}
    parts = [tensors(drawn(settings, objective, rank=rank, **size)) for rank in range(ranks)]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name


def test_an_offset_is_one_number_per_sample_and_channel():
    offset = drawn(Train(noise_offset=0.25), EPSILON, 512).noise_BCHW
    offset = offset - drawn(Train(), EPSILON, 512).noise_BCHW
    torch.testing.assert_close(offset, offset.mean((2, 3), keepdim=True).expand_as(offset))
    # Of 2048 normal numbers, the mean and the deviation are known to 0.022 and 0.016 of theirs.
    assert float(offset[:, :, 0, 0].std()) == pytest.approx(0.25, rel=5 * 0.016)
    assert abs(float(offset[:, :, 0, 0].mean())) < 5 * 0.022 * 0.25


@given(st.integers(1, 40), st.integers(1, 40))
def test_enlarged_noise_has_variance_one_in_every_pixel(size, coarse):
    """Of a pixel sum_j w_j n_j with independent n_j, that is sum_j w_j**2."""
    rows = noise.rows(size, min(size, coarse))
    torch.testing.assert_close((rows**2).sum(1), torch.ones(size))


@pytest.mark.parametrize("discount", [0.3, 0.8])
def test_multires_noise_has_variance_one_and_more_of_it_is_coarse(discount):
    settings = Train(multires_noise_iterations=3, multires_noise_discount=discount)
    found = drawn(settings, EPSILON, 1024).noise_BCHW
    assert float((found**2).mean()) == pytest.approx(1, abs=0.05)
    means = found.mean((2, 3))
    assert float(means.std()) > 1.3 * 1 / math.sqrt(8 * 6)  # of white noise: exactly this


def test_coarser_noise_ends_where_a_side_is_one():
    assert noise.pyramid(2, 8, 6) == [(4, 3), (2, 2)]
    assert noise.pyramid(99, 8, 6) == [(4, 3), (2, 2), (1, 1)]
    assert noise.pyramid(99, 1, 6) == []


@given(st.integers(0, 50), st.integers(1, 50))
def test_timesteps_stay_within_their_bounds_and_reach_them(low, width):
    settings = Train(min_timestep=low, max_timestep=low + width)
    found = drawn(settings, EPSILON, 1000).timesteps_B
    # A value is missed by all 1000 draws with probability below (1 - 1/50)**1000 < 2e-9.
    assert set(found.tolist()) == set(range(low, low + width))


@pytest.mark.parametrize(("mean", "std"), [(None, None), (-1.0, 0.5), (2.0, 3.0)])
def test_logit_normal_timesteps_are_distributed_as_said(mean, std):
    settings = Train(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    found = drawn(settings, FLOW, 4000).timesteps_B
    m, s = mean or 0.0, std or 1.0
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        # P(t < T share) = Phi((logit(share) - m) / s)
        below = 0.5 * (1 + math.erf((math.log(share / (1 - share)) - m) / (s * math.sqrt(2))))
        assert float((found < T * share).float().mean()) == pytest.approx(below, abs=0.04)


@given(st.floats(-30, 30), st.floats(0.1, 10), st.integers(0, 50), st.integers(51, T))
def test_logit_normal_timesteps_stay_within_bounds_however_far_out(mean, std, low, high):
    settings = Train(
        timestep_sampling="logit_normal",
        logit_mean=mean,
        logit_std=std,
        min_timestep=low,
        max_timestep=high,
    )
    n = torch.tensor([-40.0, -1.0, 0.0, 1.0, 40.0])
    found = noise.logit_normal(settings, FLOW, n)
    assert (found >= low).all() and (found < high).all()
    assert found.tolist() == sorted(found.tolist())


@settings_of_all
def test_quantiles_are_those_of_what_is_drawn(settings, objective):
    many = drawn(settings, objective, 4000).timesteps_B
    for share in (0.1, 0.5, 0.9):
        at = int(noise.quantiles(settings, objective, torch.tensor([share])))
        assert float((many < at).float().mean()) <= share + 0.03
        assert float((many <= at).float().mean()) >= share - 0.03


@pytest.mark.parametrize(
    ("settings", "objective", "message"),
    [
        (Train(max_timestep=T + 1), EPSILON, "train.max_timestep is 101, needs <= 100"),
        (Train(min_timestep=T), FLOW, "train.min_timestep is 100, needs <= 99"),
        (Train(timestep_sampling="logit_normal"), EPSILON, "predicts 'epsilon'"),
    ],
)
def test_what_the_model_does_not_allow_is_refused(settings, objective, message):
    with pytest.raises(UserError, match=message):
        noise.check(settings, objective)
    noise.check(Train(min_timestep=T - 1, max_timestep=T), objective)
