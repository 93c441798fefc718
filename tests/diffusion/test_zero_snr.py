"""Noise up to noise alone: what is trained on, what samples are drawn by, and who may not."""

import dataclasses

import pytest
import torch

from lyco_lab.config import Model
from lyco_lab.diffusion.model import ZERO_SNR, fingerprint, load, objective
from lyco_lab.errors import UserError


@pytest.fixture
def models(tiny_of):
    """The same model without and with it."""
    plain = Model(path=str(tiny_of("sd2")))
    return plain, dataclasses.replace(plain, zero_terminal_snr=True)


def test_the_last_timestep_is_noise_alone_and_the_first_as_it_was(models):
    plain, zero = map(objective, models)
    assert float(zero.alphas_T[-1]) == 0 < float(plain.alphas_T[-1])
    torch.testing.assert_close(zero.alphas_T[0], plain.alphas_T[0])
    assert (zero.alphas_T.diff() < 0).all()
    z, e = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999])
    assert torch.equal(zero.noisy(z, e, t), e)
    assert torch.equal(zero.target(z, e, t), -z)


def test_samples_follow_the_same_noise(models):
    diffusion = load(models[1])
    scheduler = diffusion.ddim()
    torch.testing.assert_close(scheduler.alphas_cumprod, diffusion.objective.alphas_T)
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == 999  # it begins where there is noise alone
    one, other = (load(model).sample(["a"], [0], 2, 1.0) for model in models)
    assert (one != other).any()


def test_it_is_another_model(models):
    one, other = map(fingerprint, models)
    assert one != other


def test_only_a_velocity_can_be_predicted_there(tiny_of):
    for family, name in (("sd1", "epsilon"), ("sd3", "flow")):
        with pytest.raises(UserError, match=f"predicts '{name}'"):
            objective(Model(path=str(tiny_of(family)), zero_terminal_snr=True))
    with pytest.raises(UserError, match="model.prediction is 'epsilon'"):
        Model(prediction="epsilon", zero_terminal_snr=True)


def test_a_model_that_says_so_itself_needs_no_setting(tiny_of, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(tiny_of("sd2"), tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ZERO_SNR))
    assert float(objective(folder).alphas_T[-1]) == 0
    with pytest.raises(UserError, match="says so already"):
        objective(Model(path=str(folder), zero_terminal_snr=True))
