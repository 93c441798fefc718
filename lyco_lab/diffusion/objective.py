"""What a denoiser is trained to predict, and how noise is mixed into what it sees.

    Epsilon    z_t = alpha_t z + sigma_t e      target e
    Velocity   z_t = alpha_t z + sigma_t e      target v = alpha_t e - sigma_t z
    Flow       z_t = (1 - sigma_t) z + sigma_t e    target e - z

with z a latent, e noise of its shape, alpha_t**2 + sigma_t**2 = 1 in the first two, and t a whole
number from 0, where there is least noise. The signal-to-noise ratio is (alpha_t / sigma_t)**2,
with alpha_t = 1 - sigma_t for flows.

References:
    Progressive Distillation for Fast Sampling of Diffusion Models (Salimans and Ho, 2022),
    https://arxiv.org/abs/2202.00512, for the velocity
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024),
    https://arxiv.org/abs/2403.03206, for flows and their shift
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lyco_lab.errors import UserError


@dataclass(frozen=True, eq=False)
class Objective(abc.ABC):
    """How a latent is made noisy at a timestep, and what is to be predicted from it."""

    name: ClassVar[str]  # of the prediction, as diffusers has it where it has one

    @property
    @abc.abstractmethod
    def timesteps(self) -> int:
        """How many there are."""

    @abc.abstractmethod
    def noisy(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t, of a batch of latents and a timestep for each."""

    @abc.abstractmethod
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect denoiser answers to z_t."""

    @abc.abstractmethod
    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio at each timestep."""

    def time(self, t: Tensor) -> Tensor:
        """The number by which the denoiser is told of a timestep."""
        return t


@dataclass(frozen=True, eq=False)
class Diffused(Objective):
    """Variance is preserved: alpha_t = sqrt(a_t) and sigma_t = sqrt(1 - a_t)."""

    alphas_T: Tensor  # a_t, the products of (1 - beta), which fall with t

    @property
    def timesteps(self) -> int:
        return len(self.alphas_T)

    def noisy(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.shares(latents, t)
        return alpha * latents + sigma * noise

    def snr(self, t: Tensor) -> Tensor:
        alphas = at(self.alphas_T, t)
        return alphas / (1 - alphas)

    def shares(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, to be multiplied with tensors of the shape of `like`."""
        alphas = over(at(self.alphas_T.to(like.dtype), t), like)
        return alphas**0.5, (1 - alphas) ** 0.5


class Epsilon(Diffused):
    """The noise."""

    name = "epsilon"

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise


class Velocity(Diffused):
    """The velocity along the arc from the latent to the noise; defined where a_t is 0, too."""

    name = "v_prediction"

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.shares(latents, t)
        return alpha * noise - sigma * latents


@dataclass(frozen=True, eq=False)
class Flow(Objective):
    """The velocity along the straight line from the latent to the noise."""

    name = "flow"
    sigmas_T: Tensor  # the share of noise, which grows with t up to 1

    @property
    def timesteps(self) -> int:
        return len(self.sigmas_T)

    def noisy(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = over(at(self.sigmas_T.to(latents.dtype), t), latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - latents

    def snr(self, t: Tensor) -> Tensor:
        sigmas = at(self.sigmas_T, t)
        return ((1 - sigmas) / sigmas) ** 2

    def time(self, t: Tensor) -> Tensor:
        return self.timesteps * at(self.sigmas_T, t)

    @classmethod
    def shifted(cls, timesteps: int, shift: float) -> "Flow":
        """Evenly spaced shares of noise s, moved towards more of it: shift s / (1 + (shift - 1) s).

        Larger images need that: as much noise per pixel hides less of them.
        """
        s_T = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
        return cls((shift * s_T / (1 + (shift - 1) * s_T)).float())


def of_scheduler(config: Mapping[str, Any], prediction: str | None, where: str) -> Objective:
    """The objective that a diffusers scheduler's configuration means.

    `prediction` overrides what the configuration says; `where` names it in errors.
    """
    from diffusers import DDPMScheduler

    kind = str(config.get("_class_name", ""))
    if kind.startswith("FlowMatch"):
        if prediction is not None:
            raise UserError(
                f"model.prediction is {prediction!r}, but {where} is trained by flow matching, "
                "which predicts one thing only: leave it null"
            )
        if config.get("use_dynamic_shifting"):
            raise UserError(
                f"the scheduler of {where} shifts by image size, which is not supported"
            )
        return Flow.shifted(config.get("num_train_timesteps", 1000), config.get("shift", 1.0))
    if kind.startswith(("EDM", "Cosine", "VQ")):
        raise UserError(f"{where} has the scheduler {kind}, whose objective is not supported")
    name = prediction or config.get("prediction_type", "epsilon")
    if name is None:
        raise UserError(
            f"{where} does not say what it predicts: set model.prediction to v_prediction for the "
            "models of 768 pixels, to epsilon for the base models of 512"
        )
    known = {cls.name: cls for cls in (Epsilon, Velocity)}
    if name not in known:
        raise UserError(
            f"the model in {where} predicts {name!r}; training needs one that predicts "
            f"{' or '.join(map(repr, known))}"
        )
    return known[name](DDPMScheduler.from_config(dict(config)).alphas_cumprod)


def at(table_T: Tensor, t: Tensor) -> Tensor:
    return table_T.to(t.device)[t]


def over(values_B: Tensor, like: Tensor) -> Tensor:
    """A number per sample, to be multiplied with tensors of the shape of `like`."""
    return values_B.view(-1, *[1] * (like.dim() - 1)).to(like.device)
