"""Objectives against their definitions, and against diffusers' schedulers."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.diffusion.objective import Diffused, Epsilon, Flow, Velocity, of_scheduler
from lyco_lab.errors import UserError
from lyco_lab.seeds import generator
from tests.diffusion.tiny import SCHEDULE
from tests.strategies import seeds

DDIM = {"_class_name": "DDIMScheduler", **SCHEDULE}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
shapes = st.sampled_from([(1, 4, 8, 8), (3, 4, 6, 10), (2, 16, 4, 4), (2, 5)])


def drawn(seed, shape, timesteps):
    rng = generator(seed, "test")
    t = torch.randint(timesteps, shape[:1], generator=rng)
    z, e = torch.randn(2, *shape, generator=rng, dtype=torch.float64)
    return z, e, t


def share(table, t, like):
    return table.double()[t].view(-1, *[1] * (like.dim() - 1))


def made(objective):
    """In float64, for laws that rounding would hide."""
    fields = {f.name: getattr(objective, f.name).double() for f in dataclasses.fields(objective)}
    return type(objective)(**fields)


@given(seeds, shapes, st.booleans())
def test_noise_preserves_variance_and_velocity_is_the_arc_s(seed, shape, zero_snr):
    config = DDIM | {"rescale_betas_zero_snr": zero_snr}
    epsilon = made(of_scheduler(config, "epsilon", "x"))
    velocity = made(of_scheduler(config, "v_prediction", "x"))
    z, e, t = drawn(seed, shape, epsilon.timesteps)
    a = share(epsilon.alphas_T, t, z)
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    noisy = epsilon.noisy(z, e, t)
    torch.testing.assert_close(noisy, alpha * z + sigma * e)
    torch.testing.assert_close(velocity.noisy(z, e, t), noisy)
    assert torch.equal(epsilon.target(z, e, t), e)
    v = velocity.target(z, e, t)
    torch.testing.assert_close(v, alpha * e - sigma * z)
    # z_t and v are z and e, rotated: both come back.
    torch.testing.assert_close(alpha * noisy - sigma * v, z)
    torch.testing.assert_close(sigma * noisy + alpha * v, e)
    torch.testing.assert_close(v**2 + noisy**2, z**2 + e**2)
    snr = velocity.snr(t).view_as(a)
    torch.testing.assert_close(snr * sigma**2, alpha**2)


@given(seeds, shapes, st.sampled_from([1.0, 3.0, 6.0]))
def test_a_flow_is_a_straight_line_from_the_latent_to_the_noise(seed, shape, shift):
    flow = made(of_scheduler(FLOW | {"shift": shift}, None, "x"))
    z, e, t = drawn(seed, shape, flow.timesteps)
    sigma = share(flow.sigmas_T, t, z)
    noisy, velocity = flow.noisy(z, e, t), flow.target(z, e, t)
    torch.testing.assert_close(noisy - sigma * velocity, z)
    torch.testing.assert_close(noisy + (1 - sigma) * velocity, e)
    torch.testing.assert_close(flow.snr(t).view_as(sigma) * sigma**2, (1 - sigma) ** 2)
    torch.testing.assert_close(flow.time(t), flow.timesteps * flow.sigmas_T[t])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusers_does_the_same(prediction):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(DDIM | {"prediction_type": prediction})
    objective = of_scheduler(DDIM, prediction, "x")
    z, e = torch.randn(2, 1000, 4, 2, 2, generator=generator(0, "test"))
    t = torch.arange(1000)
    assert objective.timesteps == 1000
    assert torch.equal(objective.noisy(z, e, t), scheduler.add_noise(z, e, t))
    if prediction == "v_prediction":
        assert torch.equal(objective.target(z, e, t), scheduler.get_velocity(z, e, t))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_flow_has_the_same_shares_of_noise(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = of_scheduler(dict(scheduler.config) | FLOW, None, "x")
    t = torch.arange(flow.timesteps)
    torch.testing.assert_close(flow.sigmas_T, scheduler.sigmas.flip(0))
    torch.testing.assert_close(flow.time(t), scheduler.timesteps.flip(0))
    z, e = torch.randn(2, len(t), 4, 2, 2, generator=generator(0, "test"))
    theirs = scheduler.scale_noise(z, scheduler.timesteps, e).flip(0)
    torch.testing.assert_close(flow.noisy(z.flip(0), e.flip(0), t), theirs)


@pytest.mark.parametrize("cls", [Epsilon, Velocity, Flow])
def test_there_is_less_signal_at_every_timestep(cls):
    config = FLOW if cls is Flow else DDIM
    objective = of_scheduler(config, None if cls is Flow else cls.name, "x")
    assert type(objective) is cls
    snr = objective.snr(torch.arange(objective.timesteps))
    assert (snr.diff() < 0).all() and snr[0] > 100 and snr[-1] >= 0


def test_without_any_signal_the_velocity_is_still_defined():
    objective = of_scheduler(DDIM | {"rescale_betas_zero_snr": True}, "v_prediction", "x")
    z, e = torch.randn(2, 1, 4, 2, 2, generator=generator(0, "test"))
    last = torch.tensor([999])
    assert objective.snr(last) == 0
    assert torch.equal(objective.noisy(z, e, last), e)
    assert torch.equal(objective.target(z, e, last), -z)


def test_half_precision_latents_stay_so():
    for config in (DDIM, FLOW):
        objective = of_scheduler(config, None, "x")
        z, e = torch.randn(2, 2, 4, 2, 2, dtype=torch.bfloat16)
        t = torch.tensor([1, 500])
        assert objective.noisy(z, e, t).dtype == torch.bfloat16
        assert objective.target(z, e, t).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "prediction", "words"),
    [
        ({"prediction_type": "sample"}, None, "predicts 'sample'; training needs"),
        ({"prediction_type": None}, None, "does not say what it predicts"),
        ({"_class_name": "EDMEulerScheduler"}, None, "EDMEulerScheduler, whose objective"),
        (FLOW, "epsilon", "model.prediction is 'epsilon', but the model is trained by flow"),
        (FLOW | {"use_dynamic_shifting": True}, None, "shifts by image size"),
    ],
)
def test_objectives_that_are_not_supported_are_refused(config, prediction, words):
    with pytest.raises(UserError, match=words):
        of_scheduler(DDIM | config, prediction, "the model")


def test_objectives_are_abstract_or_whole():
    with pytest.raises(TypeError, match="abstract"):
        Diffused(torch.ones(1))
