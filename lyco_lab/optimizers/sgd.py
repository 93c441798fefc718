"""SGD with momentum.

    d = g + weight_decay * theta          b <- momentum * b + (1 - dampening) * d   (first: b = d)
    theta <- theta - lr * b               Nesterov: theta - lr * (d + momentum * b)

The direction is linear in the gradient, so the learning rate moves by s**2, as theory/optimizers
derives.

Reference: On the importance of initialization and momentum in deep learning (Sutskever et al.,
2013), https://proceedings.mlr.press/v28/sutskever13.html
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE


@dataclass(frozen=True)
class SGD(Optimizer):
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01  # added to the gradient
    momentum: Annotated[float, SHARE] = 0.0
    dampening: Annotated[float, SHARE] = 0.0
    nesterov: bool = False

    powers: ClassVar = {"lr": 2, "weight_decay": -2}

    def __post_init__(self) -> None:
        self.check(weight_decay=(0, float("inf")), momentum=(0, 1), dampening=(0, 1))
        if self.nesterov and not (self.momentum > 0 and self.dampening == 0):
            self.refuse("needs momentum > 0 and dampening = 0 for nesterov")

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, fused=True)  # one call for hundreds of small factors
