"""Adam: each factor moves by its mean gradient, measured in its mean size.

    d = g + weight_decay * theta
    m <- beta1 * m + (1 - beta1) * d          v <- beta2 * v + (1 - beta2) * d**2
    theta <- theta - lr * m^ / (sqrt(v^) + eps)          m^, v^: corrected for their start at 0

With `amsgrad`, v^ is the largest so far. The direction does not depend on the size of the gradient,
so the learning rate moves by s and eps by 1 / s; the decay is part of the gradient, which moves by
1 / s where theta moves by s, hence weight_decay by 1 / s**2, as theory/optimizers derives.

Reference: Adam: A Method for Stochastic Optimization (Kingma & Ba, 2015),
https://arxiv.org/abs/1412.6980
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE


@dataclass(frozen=True)
class Adam(Optimizer):
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.99)
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    # Added to the gradient, so divided by its size: see AdamW
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    amsgrad: bool = False

    powers: ClassVar = {"lr": 1, "eps": -1, "weight_decay": -2}

    def __post_init__(self) -> None:
        self.check(betas=(0, 1), eps=(0, float("inf")), weight_decay=(0, float("inf")))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, fused=True)  # one call for hundreds of small factors
