"""NAdam: Adam with Nesterov's look ahead.

    d = g + weight_decay * theta
    m <- beta1 * m + (1 - beta1) * d          v <- beta2 * v + (1 - beta2) * d**2
    mu_t = beta1 * (1 - 0.96**(t * momentum_decay) / 2)          M_t = mu_1 * ... * mu_t
    theta <- theta - lr * (mu_t+1 * m / (1 - M_t+1) + (1 - mu_t) * d / (1 - M_t)) / (sqrt(v^) + eps)

The direction does not depend on the size of the gradient, so the learning rate moves by s, eps by
1 / s, and weight_decay by 1 / s**2, as theory/optimizers derives.

Reference: Incorporating Nesterov Momentum into Adam (Dozat, 2016),
https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE, Within


@dataclass(frozen=True)
class NAdam(Optimizer):
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.99)
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # added to the gradient
    momentum_decay: Annotated[float, Within(0, 100)] = 0.004

    powers: ClassVar = {"lr": 1, "eps": -1, "weight_decay": -2}

    def __post_init__(self) -> None:
        most = float("inf")
        self.check(betas=(0, 1), eps=(0, most), weight_decay=(0, most), momentum_decay=(0, most))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.NAdam(groups, foreach=True)
