"""RMSprop: the gradient, divided by its root mean square.

    d = g + weight_decay * theta              v <- alpha * v + (1 - alpha) * d**2
    b <- momentum * b + d / (sqrt(v) + eps)
    theta <- theta - lr * b

If `centered`, the square of the mean gradient is taken from v first. The direction does not depend
on the size of the gradient, so the learning rate moves by s, eps by 1 / s, and weight_decay by
1 / s**2, as theory/optimizers derives.

References:
    Lecture 6.5 of Neural Networks for Machine Learning (Tieleman & Hinton, 2012),
    https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    Generating Sequences With Recurrent Neural Networks (Graves, 2013), for the centered form,
    https://arxiv.org/abs/1308.0850
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE


@dataclass(frozen=True)
class RMSprop(Optimizer):
    alpha: Annotated[float, SHARE] = 0.99
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # added to the gradient
    momentum: Annotated[float, SHARE] = 0.0
    centered: bool = False

    powers: ClassVar = {"lr": 1, "eps": -1, "weight_decay": -2}

    def __post_init__(self) -> None:
        most = float("inf")
        self.check(alpha=(0, 1), eps=(0, most), weight_decay=(0, most), momentum=(0, 1))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, foreach=True)
