"""Adamax: Adam that measures the gradient by its largest size, slowly forgotten.

    d = g + weight_decay * theta
    m <- beta1 * m + (1 - beta1) * d          u <- max(beta2 * u, |d| + eps)
    theta <- theta - lr * m^ / u              m^: corrected for its start at 0

The direction does not depend on the size of the gradient, so the learning rate moves by s, eps by
1 / s, and weight_decay by 1 / s**2, as theory/optimizers derives.

Reference: Adam: A Method for Stochastic Optimization (Kingma & Ba, 2015), section 7.1,
https://arxiv.org/abs/1412.6980
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE


@dataclass(frozen=True)
class Adamax(Optimizer):
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.99)
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # added to the gradient

    powers: ClassVar = {"lr": 1, "eps": -1, "weight_decay": -2}

    def __post_init__(self) -> None:
        self.check(betas=(0, 1), eps=(0, float("inf")), weight_decay=(0, float("inf")))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adamax(groups, foreach=True)
