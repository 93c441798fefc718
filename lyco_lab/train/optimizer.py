"""What moves the factors: AdamW or SGD, a warm-up, clipping, and an average of where they were.

    lr_n     = lr * min(1, (n + 1) / warmup_steps)              at step n = 0, 1, …
    g       <- g * min(1, grad_clip / |g|)                      |g| over all factors together
    average <- average + (1 - ema_decay) * (factor - average)   after the step

Each commutes with scaling the factors by a power of two, which the bitwise check of the gamma
theorem needs. That is why clipping is written here: torch's adds 1e-6 to the norm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lyco_lab.config import Train


def build(settings: Train, groups: Mapping[str, Sequence[nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimizer, with a group for each part of the model."""
    text_lr = settings.lr if settings.text_encoder_lr is None else settings.text_encoder_lr
    listed: list[dict[str, Any]] = [
        {
            "params": list(parameters),
            "lr": text_lr if part == "text_encoder" else settings.lr,
            "name": part,
        }
        for part, parameters in groups.items()
    ]
    for group in listed:
        group["base_lr"] = group["lr"]  # `lr` follows the schedule
    # Fused: one call for hundreds of small factors.
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            listed, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        listed,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, step: int, warmup_steps: int) -> None:
    """Give each group its learning rate at step 0, 1, …"""
    share = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


@torch.no_grad()
def clip(optimizer: torch.optim.Optimizer, largest: float | None) -> float:
    """Scale all gradients down together if their norm exceeds `largest`; return what it was."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if largest is not None and norm > largest:
        torch._foreach_mul_(gradients, largest / norm)
    return norm


class Average:
    """An exponential moving average of the factors, which is exported in their place."""

    def __init__(self, factors: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._factors = dict(factors)
        self.values = {name: factor.detach().clone() for name, factor in factors.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(
            list(self.values.values()), list(self._factors.values()), 1 - self.decay
        )

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange average and factors; again, and both are back bit for bit."""
        for name, factor in self._factors.items():
            kept = factor.detach().clone()
            factor.copy_(self.values[name])
            self.values[name].copy_(kept)
