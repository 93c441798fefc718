"""Losses against their definitions, and weights against what they mean."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.config import Train
from lyco_lab.diffusion.objective import Epsilon, Flow, Velocity
from lyco_lab.errors import UserError
from lyco_lab.train.loss import check, distance, loss, of_timesteps

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0)
TERMINAL = torch.cat([ALPHAS[:-1], torch.zeros(1, dtype=torch.float64)])  # ends in noise alone
seeds = st.integers(0, 10_000)
weighings = st.one_of(
    st.floats(0.1, 50).map(lambda gamma: Train(min_snr_gamma=gamma)), st.just(Train(debiased=True))
)


def normal(seed, *shape):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (3, 4, 5, 6), generator=rng, dtype=torch.float64)


def timesteps(seed, count=3):
    return torch.randint(1000, (count,), generator=torch.Generator().manual_seed(seed))


@given(seeds, st.sampled_from(["mse", "huber", "smooth_l1"]), st.floats(0.05, 2))
def test_each_distance_matches_its_definition(seed, kind, delta):
    predicted, target = normal(seed), normal(seed + 1)
    settings = Train(loss=kind, huber_delta=None if kind == "mse" else delta)
    found = distance(settings, predicted, target).flatten().tolist()
    for value, d in zip(found, (predicted - target).flatten().tolist(), strict=True):
        huber = d**2 if abs(d) <= delta else 2 * delta * abs(d) - delta**2
        expected = {"mse": d**2, "huber": huber, "smooth_l1": huber / delta}[kind]
        assert value == pytest.approx(expected, rel=1e-12)


@given(seeds)
def test_huber_with_a_delta_beyond_all_errors_is_the_squared_error(seed):
    predicted, target = normal(seed).float(), normal(seed + 1).float()
    delta = 2 * float((predicted - target).abs().max())
    settings = Train(loss="huber", huber_delta=delta)
    t, objective = timesteps(seed), Epsilon(ALPHAS)
    robust = loss(settings, objective, predicted, target, t)
    torch.testing.assert_close(robust, loss(Train(), objective, predicted, target, t))


@given(seeds, weighings)
def test_weights_mean_the_same_whatever_the_model_predicts(seed, settings):
    """One guess of the latent, said as noise and as velocity, costs the same."""
    z, e, guess, t = normal(seed), normal(seed + 1), normal(seed + 2), timesteps(seed)
    epsilon, velocity = Epsilon(ALPHAS), Velocity(ALPHAS)
    noisy = epsilon.noisy(z, e, t)
    alpha, sigma = epsilon.shares(z, t)
    noise = (noisy - alpha * guess) / sigma  # the noise that the guess leaves
    costs = [
        loss(settings, objective, objective.target(guess, noise, t), objective.target(z, e, t), t)
        for objective in (epsilon, velocity)
    ]
    torch.testing.assert_close(*costs, rtol=1e-6, atol=0)
    gamma = settings.min_snr_gamma
    r_B = ALPHAS[t] / (1 - ALPHAS[t])
    m_B = r_B.sqrt() if gamma is None else r_B.clamp(max=gamma)
    expected = (m_B * ((guess - z) ** 2).flatten(1).mean(1)).mean()
    torch.testing.assert_close(costs[0], expected, rtol=1e-6, atol=0)


@given(st.floats(0.1, 50))
def test_min_snr_is_the_papers_formula_at_every_timestep(gamma):
    t, r_T = torch.arange(1000), ALPHAS / (1 - ALPHAS)
    for cls, divisor in ((Epsilon, r_T), (Velocity, r_T + 1)):
        found = of_timesteps(Train(min_snr_gamma=gamma), cls(ALPHAS), t)
        expected = [min(r, gamma) / d for r, d in zip(r_T.tolist(), divisor.tolist(), strict=True)]
        assert found.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "cls", "expected"),
    [
        (Train(min_snr_gamma=5.0), Epsilon, 1.0),  # min(r, gamma) / r for every small r
        (Train(min_snr_gamma=5.0), Velocity, 0.0),
        (Train(debiased=True), Velocity, 0.0),
    ],
)
def test_where_there_is_no_signal_the_weight_is_its_limit(settings, cls, expected):
    check(settings, cls(TERMINAL))
    weights = of_timesteps(settings, cls(TERMINAL), torch.arange(1000))
    assert weights.isfinite().all() and float(weights[-1]) == expected
    z = normal(0, 1, 4, 5, 6).float()
    perfect = loss(settings, cls(TERMINAL), z, z, torch.tensor([999]))
    assert float(perfect) == 0


@pytest.mark.parametrize("settings", [Train(min_snr_gamma=5.0), Train(debiased=True)])
def test_where_there_is_no_noise_the_weight_is_its_limit(settings):
    clean = torch.cat([torch.ones(1, dtype=torch.float64), ALPHAS])
    for cls in (Epsilon, Velocity):
        assert float(of_timesteps(settings, cls(clean), torch.tensor([0]))) == 0


def test_an_infinite_weight_is_an_error_unless_its_timestep_is_left_out():
    with pytest.raises(UserError, match=r"train.debiased .* train.max_timestep"):
        check(Train(debiased=True), Epsilon(TERMINAL))
    check(Train(debiased=True, max_timestep=999), Epsilon(TERMINAL))
    check(Train(debiased=True), Epsilon(ALPHAS))


@pytest.mark.parametrize("settings", [Train(min_snr_gamma=5.0), Train(debiased=True)])
def test_flows_are_not_weighed_by_their_ratio(settings):
    with pytest.raises(UserError, match=r"'flow': .* train.timestep_sampling"):
        check(settings, Flow.shifted(1000, 3.0))


@given(seeds, st.sampled_from(["mse", "huber"]), weighings | st.just(Train()))
def test_masks_multiply_and_leave_the_number_of_entries_alone(seed, kind, weighing):
    settings = Train(loss=kind, min_snr_gamma=weighing.min_snr_gamma, debiased=weighing.debiased)
    predicted, target, t = normal(seed), normal(seed + 1), timesteps(seed)
    mask = (normal(seed + 2, 3, 1, 5, 6) > 0).double() * torch.tensor([0.5, 1, 2]).view(3, 1, 1, 1)
    objective = Epsilon(ALPHAS)
    w_B = of_timesteps(settings, objective, t)
    w_B = torch.ones(3) if w_B is None else w_B
    total = 0.0
    for b in range(3):
        entries = distance(settings, predicted[b], target[b])
        total += float(w_B[b]) * float((mask[b] * entries).sum())
    found = loss(settings, objective, predicted, target, t, mask)
    assert float(found) == pytest.approx(total / predicted.numel(), rel=1e-6)


@given(seeds, weighings, st.integers(1, 3))
def test_the_loss_of_a_batch_is_the_mean_of_its_samples(seed, settings, count):
    predicted, target, t = normal(seed), normal(seed + 1), timesteps(seed)
    objective = Velocity(ALPHAS)
    whole = loss(settings, objective, predicted, target, t)
    parts = [
        loss(settings, objective, predicted[b : b + 1], target[b : b + 1], t[b : b + 1])
        for b in range(3)
    ]
    assert float(whole) == pytest.approx(math.fsum(map(float, parts)) / 3, rel=1e-6)
