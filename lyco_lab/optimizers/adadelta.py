"""Adadelta: steps measured in former steps, so that no learning rate has to give them a unit.

    d = g + weight_decay * theta              v <- rho * v + (1 - rho) * d**2
    delta = sqrt(u + eps) / sqrt(v + eps) * d
    u <- rho * u + (1 - rho) * delta**2       theta <- theta - lr * delta

Reference: ADADELTA: An Adaptive Learning Rate Method (Zeiler, 2012),
https://arxiv.org/abs/1212.5701
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer


@dataclass(frozen=True)
class Adadelta(Optimizer):
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0  # added to the gradient

    no_gamma: ClassVar = (
        "its one eps is added to the squares of gradients, which move by 1 / s**2, and to the "
        "squares of steps, which move by s**2, and it cannot move both ways"
    )
    exact: ClassVar = False  # there is nothing to be exact

    def __post_init__(self) -> None:
        self.check(rho=(0, 1), eps=(0, float("inf")), weight_decay=(0, float("inf")))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adadelta(groups, foreach=True)
