"""How far a prediction is from its target, and how much each timestep counts.

With d = predicted - target, entry by entry,

    mse          d**2
    huber        d**2 where |d| <= delta, else 2 delta |d| - delta**2
    smooth_l1    huber / delta

and the loss is the mean of w_t times that over all entries of all samples. With r the ratio of
signal to noise at timestep t, squared errors in the noise, the velocity and the latent that mean
the same are as r, r + 1 and 1. So weights m_t of errors in the latent are

    w_t = m_t / r          where the noise is predicted
    w_t = m_t / (r + 1)    where the velocity is

    min_snr_gamma    m_t = min(r, gamma)
    debiased         m_t = sqrt(r)

A flow has its weights in the timesteps that it draws (noise.py).

References:
    Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023),
    https://arxiv.org/abs/2303.09556
    Debias the Training of Diffusion Models (Yu et al., 2023), https://arxiv.org/abs/2310.08442
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lyco_lab.config import Train
from lyco_lab.diffusion.objective import Epsilon, Objective, Velocity
from lyco_lab.errors import UserError

DELTA = 0.1  # where huber_delta is null; errors of a trained model are about that large


def loss(
    settings: Train,
    objective: Objective,
    predicted: Tensor,
    target: Tensor,
    t: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """The mean over a batch. `weights` multiply the errors, and fit their shape: masks, say."""
    w_B = of_timesteps(settings, objective, t)
    if settings.loss == "mse" and weights is None and w_B is None:
        return F.mse_loss(predicted, target)
    errors = distance(settings, predicted, target)
    if weights is not None:
        errors = errors * weights
    errors_B = errors.flatten(1).mean(1)
    return (errors_B if w_B is None else errors_B * w_B.to(errors_B)).mean()


def distance(settings: Train, predicted: Tensor, target: Tensor) -> Tensor:
    """Of each entry."""
    if settings.loss == "mse":
        return (predicted - target) ** 2
    delta = DELTA if settings.huber_delta is None else settings.huber_delta
    twice = 2 * F.huber_loss(predicted, target, reduction="none", delta=delta)
    return twice / delta if settings.loss == "smooth_l1" else twice


def of_timesteps(settings: Train, objective: Objective, t: Tensor) -> Tensor | None:
    """w_t; None: 1. No ratio, 0 or infinite, makes it undefined where its limit is finite."""
    gamma = settings.min_snr_gamma
    if gamma is None and not settings.debiased:
        return None
    r = objective.snr(t)
    if isinstance(objective, Velocity):
        return 1 / (r.sqrt() + r.rsqrt()) if gamma is None else r.clamp(max=gamma) / (r + 1)
    return r.rsqrt() if gamma is None else (gamma / r).clamp(max=1)


def check(settings: Train, objective: Objective) -> None:
    """Whether the weights exist for what is predicted."""
    weighs = settings.min_snr_gamma is not None or settings.debiased
    if weighs and not isinstance(objective, Epsilon | Velocity):
        key = "debiased" if settings.debiased else "min_snr_gamma"
        raise UserError(
            f"train.{key} is {getattr(settings, key)!r}, which is for models that predict the "
            f"noise or the velocity, but this model predicts {objective.name!r}: its timesteps are "
            "weighed by train.timestep_sampling"
        )
    if settings.debiased and isinstance(objective, Epsilon):
        ratios_T = objective.snr(torch.arange(objective.timesteps))[: settings.max_timestep]
        if not ratios_T.all():
            raise UserError(
                "train.debiased is true, but the model's last timestep is noise alone, where an "
                "error in the noise would weigh infinitely much: use train.min_snr_gamma, or end "
                "before it with train.max_timestep"
            )
