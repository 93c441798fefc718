"""RAdam: Adam whose rate is rectified while few gradients have been averaged.

    d = g + weight_decay * theta
    m <- beta1 * m + (1 - beta1) * d          v <- beta2 * v + (1 - beta2) * d**2
    rho_t = rho_inf - 2 t beta2**t / (1 - beta2**t)          rho_inf = 2 / (1 - beta2) - 1

    rho_t <= 5:  theta <- theta - lr * unrectified_lr * m^                   (the first steps)
    rho_t > 5:   theta <- theta - lr * r_t * m^ / (sqrt(v^) + eps)           r_t a function of rho_t

m^ and v^ are corrected for their start at 0. The first steps (5, at beta2 = 0.99 as at 0.999) are
linear in the gradient, where lr must move by s**2; in the later ones the direction does not depend
on the gradient's size and lr must move by s. No one learning rate does both, so the first phase has
a factor of its own, `unrectified_lr`: 1 is the paper's rule, and 0 leaves those steps out, as its
authors' code does. lr and unrectified_lr move by s, eps by 1 / s and weight_decay by 1 / s**2, as
theory/optimizers derives.

Reference: On the Variance of the Adaptive Learning Rate and Beyond (Liu et al., 2020),
https://arxiv.org/abs/1908.03265
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE


@dataclass(frozen=True)
class RAdam(Optimizer):
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.99)
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # added to the gradient
    unrectified_lr: Annotated[float, NOT_NEGATIVE] = 1.0  # multiplies lr in the first steps

    powers: ClassVar = {"lr": 1, "eps": -1, "weight_decay": -2, "unrectified_lr": 1}

    def __post_init__(self) -> None:
        most = float("inf")
        self.check(betas=(0, 1), eps=(0, most), weight_decay=(0, most), unrectified_lr=(0, most))

    def rate(self, step: int) -> float:
        # The very arithmetic of torch, so that both change phase at the same step.
        beta2, t = self.betas[1], float(step + 1)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * (beta2**t) / (1 - beta2**t)
        return 1.0 if length > 5.0 else self.unrectified_lr

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.RAdam(groups, foreach=True)
