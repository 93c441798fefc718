"""Adadelta: steps measured in former steps, so that no learning rate has to give them a unit.

    d = g + weight_decay * theta              v <- rho * v + (1 - rho) * d**2
    delta = sqrt(u + eps) / sqrt(v + eps) * d
    u <- rho * u + (1 - rho) * delta**2       theta <- theta - lr * delta

The paper means u to be in units of theta. But u starts at 0 and so grows in units of eps, as v
does: if eps moves by 1 / s**2 with v, sqrt(u + eps) / sqrt(v + eps) stays, and delta has the unit
of the gradient. So the learning rate moves by s**2, eps and weight_decay by 1 / s**2, as
theory/optimizers derives. At eps = 0 nothing ever moves.

Reference: ADADELTA: An Adaptive Learning Rate Method (Zeiler, 2012),
https://arxiv.org/abs/1212.5701
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE


@dataclass(frozen=True)
class Adadelta(Optimizer):
    rho: Annotated[float, SHARE] = 0.9
    eps: Annotated[float, NOT_NEGATIVE] = 1e-6
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # added to the gradient

    powers: ClassVar = {"lr": 2, "eps": -2, "weight_decay": -2}

    def __post_init__(self) -> None:
        self.check(rho=(0, 1), eps=(0, float("inf")), weight_decay=(0, float("inf")))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adadelta(groups, foreach=True)
