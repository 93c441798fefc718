"""Adagrad: the gradient, divided by the root of the sum of all its squares so far.

    d = g + weight_decay * theta              v <- v + d**2       (first: initial_accumulator_value)
    theta <- theta - lr / (1 + t * lr_decay) * d / (sqrt(v) + eps)                   t = 0, 1, ...

The direction does not depend on the size of the gradient, so the learning rate moves by s, eps by
1 / s, initial_accumulator_value, the size of a squared gradient, by 1 / s**2, and so does
weight_decay, as theory/optimizers derives.

Reference: Adaptive Subgradient Methods for Online Learning and Stochastic Optimization (Duchi et
al., 2011), https://jmlr.org/papers/v12/duchi11a.html
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE


@dataclass(frozen=True)
class Adagrad(Optimizer):
    eps: Annotated[float, NOT_NEGATIVE] = 1e-10
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # added to the gradient
    lr_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    initial_accumulator_value: Annotated[float, NOT_NEGATIVE] = 0.0

    powers: ClassVar = {"lr": 1, "eps": -1, "weight_decay": -2, "initial_accumulator_value": -2}

    def __post_init__(self) -> None:
        most = float("inf")
        self.check(
            eps=(0, most),
            weight_decay=(0, most),
            lr_decay=(0, most),
            initial_accumulator_value=(0, most),
        )

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made = torch.optim.Adagrad(groups, foreach=True)
        for group in made.param_groups:  # torch starts all groups from one value
            for parameter in group["params"]:
                made.state[parameter]["sum"].fill_(group["initial_accumulator_value"])
        return made
