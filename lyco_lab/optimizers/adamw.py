"""AdamW: Adam whose weight decay is decoupled from the gradient.

    theta <- theta - lr * weight_decay * theta
    m <- beta1 * m + (1 - beta1) * g          v <- beta2 * v + (1 - beta2) * g**2
    theta <- theta - lr * m^ / (sqrt(v^) + eps)          m^, v^: corrected for their start at 0

With `amsgrad`, v^ is the largest so far. The direction does not depend on the size of the gradient,
so the learning rate moves by s, and eps and weight_decay by 1 / s, as theory/optimizers derives.

Reference: Decoupled Weight Decay Regularization (Loshchilov & Hutter, 2019),
https://arxiv.org/abs/1711.05101
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE


@dataclass(frozen=True)
class AdamW(Optimizer):
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.99)
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    # Decoupled: lr * weight_decay of a factor is taken away each step
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    amsgrad: bool = False

    powers: ClassVar = {"lr": 1, "eps": -1, "weight_decay": -1}

    def __post_init__(self) -> None:
        self.check(betas=(0, 1), eps=(0, float("inf")), weight_decay=(0, float("inf")))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, fused=True)  # one call for hundreds of small factors
