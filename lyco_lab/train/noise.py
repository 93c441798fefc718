"""Timesteps and noise as a run wants them; what is not asked for stays as the batch brings it.

    timesteps t      uniform on [low, high), or
                     low + floor((high - low) * sigmoid(mean + std * n))      n normal, for flows
    noise_offset     e + offset * o                  o normal, one number per sample and channel
    multires         (e + sum_i discount**i * U(e_i)) / sqrt(1 + sum_i discount**(2 i))
                     e_i of sides 2**i times as small, U: enlarged, each pixel of variance 1
    perturbation     the denoiser sees e + perturbation * p, p normal, and is still to predict e

Each o, n, e_i and p comes from a generator of its own for the step, drawn for all samples of the
step and dealt out as the images are: neither a stop nor the number of processes changes them.

References:
    https://www.crosslabs.org/blog/diffusion-with-offset-noise, for the offset
    Multi-Resolution Noise for Diffusion Model Training (Whitaker, 2023)
    Input Perturbation Reduces Exposure Bias in Diffusion Models (Ning et al., 2023),
    https://arxiv.org/abs/2301.11706
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024),
    https://arxiv.org/abs/2403.03206, for the timesteps of flows
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lyco_lab.config import Train
from lyco_lab.data.batches import Batch, Order
from lyco_lab.diffusion.objective import Flow, Objective
from lyco_lab.errors import UserError
from lyco_lab.seeds import generator

DISCOUNT = 0.3  # where multires_noise_discount is null


def drawn(settings: Train, objective: Objective, batch: Batch, order: Order) -> Batch:
    """The batch with the timesteps and the noise that the settings ask for."""
    first = order.rank * order.batch_size

    def dealt(what: str, make: Callable[[Generator], Tensor], *stream: int) -> Tensor:
        rng = generator(order.seed, what, batch.step, 0, *stream)
        return make(rng)[first : first + order.batch_size]

    def normal(what: str, *shape: int, stream: tuple[int, ...] = ()) -> Tensor:
        size = (order.together, *shape)
        return dealt(what, lambda rng: torch.randn(size, generator=rng), *stream)

    C, H, W = batch.noise_BCHW.shape[1:]
    low, high = bounds(settings, objective)
    if settings.timestep_sampling == "logit_normal":
        timesteps_B = logit_normal(settings, objective, normal("logit"))
        batch = batch._replace(timesteps_B=timesteps_B)
    elif (low, high) != (0, objective.timesteps):
        size = (order.together,)
        timesteps_B = dealt("timestep", lambda rng: torch.randint(low, high, size, generator=rng))
        batch = batch._replace(timesteps_B=timesteps_B)
    if settings.noise_offset is not None:
        offset_BC11 = settings.noise_offset * normal("noise offset", C, 1, 1)
        batch = batch._replace(noise_BCHW=batch.noise_BCHW + offset_BC11)
    if settings.multires_noise_iterations is not None:
        levels = [
            normal("multires", C, *sides, stream=(i,))
            for i, sides in enumerate(pyramid(settings.multires_noise_iterations, H, W), start=1)
        ]
        batch = batch._replace(noise_BCHW=multires(settings, batch.noise_BCHW, levels))
    if settings.input_perturbation is not None:
        perturbed = settings.input_perturbation * normal("perturbation", C, H, W)
        batch = batch._replace(perturbation_BCHW=perturbed)
    return batch


def bounds(settings: Train, objective: Objective) -> tuple[int, int]:
    """The least timestep, and the one after the largest."""
    high = settings.max_timestep
    return settings.min_timestep or 0, objective.timesteps if high is None else high


def logit_normal(settings: Train, objective: Objective, n_B: Tensor) -> Tensor:
    """The timesteps of normal numbers; one that is rounded up to the end is the last."""
    low, high = bounds(settings, objective)
    mean = settings.logit_mean or 0.0
    std = 1.0 if settings.logit_std is None else settings.logit_std
    shares_B = torch.sigmoid(mean + std * n_B.double())
    return (low + (high - low) * shares_B).long().clamp(max=high - 1)


def quantiles(settings: Train, objective: Objective, u_B: Tensor) -> Tensor:
    """The timesteps below which shares u of those lie that the settings draw."""
    if settings.timestep_sampling == "logit_normal":
        return logit_normal(settings, objective, torch.special.ndtri(u_B.double()))
    low, high = bounds(settings, objective)
    return (low + (high - low) * u_B.double()).long().clamp(max=high - 1)


def pyramid(iterations: int, height: int, width: int) -> list[tuple[int, int]]:
    """The sides of noise 2, 4, … times as coarse, up to the first of a single row or column."""
    sides: list[tuple[int, int]] = []
    while len(sides) < iterations and min(height, width) > 1:
        height, width = -(-height // 2), -(-width // 2)
        sides.append((height, width))
    return sides


def multires(settings: Train, noise_BCHW: Tensor, levels: list[Tensor]) -> Tensor:
    """The sum of noise and its levels, e_1, e_2, …; each entry has variance 1."""
    given = settings.multires_noise_discount
    discount = DISCOUNT if given is None else given
    H, W = noise_BCHW.shape[2:]
    total = noise_BCHW
    for i, level in enumerate(levels, start=1):
        total = total + discount**i * enlarged(level, H, W)
    return total / math.sqrt(sum(discount ** (2 * i) for i in range(len(levels) + 1)))


def enlarged(noise_BChw: Tensor, height: int, width: int) -> Tensor:
    """Interpolated linearly, then scaled so that each pixel has variance 1 again."""
    h, w = noise_BChw.shape[2:]
    return rows(height, h) @ noise_BChw @ rows(width, w).T


def rows(size: int, coarse: int) -> Tensor:
    """Row i: how pixel i of `size` is mixed from `coarse` independent ones; its norm is 1."""
    each = F.interpolate(torch.eye(coarse)[None], size, mode="linear", align_corners=False)[0].T
    return each / each.norm(dim=1, keepdim=True)


def check(settings: Train, objective: Objective) -> None:
    """Whether the timesteps exist, and suit what is predicted."""
    for key in ("min_timestep", "max_timestep"):
        value, most = getattr(settings, key), objective.timesteps - (key == "min_timestep")
        if value is not None and value > most:
            raise UserError(
                f"train.{key} is {value}, needs <= {most}: the model has {objective.timesteps} "
                "timesteps"
            )
    if settings.timestep_sampling == "logit_normal" and not isinstance(objective, Flow):
        raise UserError(
            "train.timestep_sampling is 'logit_normal', which is for models trained by flow "
            f"matching, but this model predicts {objective.name!r}: use "
            "train.min_snr_gamma to weigh its timesteps"
        )
