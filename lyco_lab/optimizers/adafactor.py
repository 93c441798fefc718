"""Adafactor: steps relative to theta's size; of a matrix's squares only means of rows and columns.

    b = t**beta2_decay
    r <- r + b * (mean of g**2 along rows - r)          c: along columns
    v = r c' / mean(r)                                  of a vector: v <- v + b * (g**2 - v)
    u = g / sqrt(v)                                     u <- u / max(1, rms(u) / d)
    theta <- (1 - lr * weight_decay) * theta - max(eps2, rms(theta)) * min(lr, 1 / sqrt(t)) * u

u does not depend on the size of the gradient, and the step is in units of theta already: the
learning rate stays, as does weight_decay, and eps2, a size of theta, moves by s, as
theory/optimizers derives.

v is kept off 0, for gradients of 0, by a number that is no setting here. torch bounds both mean(r)
by its eps1 and v by eps1**2 from below: those move by 1 / s**2 both, which one eps1 cannot follow.
2**-62 is the least whose square float32 holds, and the products r c' leave float32's range where
mean(r) would reach it: so it acts on no gradient but 0.

Reference: Adafactor: Adaptive Learning Rates with Sublinear Memory Cost (Shazeer & Stern, 2018),
https://arxiv.org/abs/1804.04235
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer

EPS1 = 2.0**-62


@dataclass(frozen=True)
class Adafactor(Optimizer):
    eps2: float = 1e-3  # the least size of theta that a step is relative to
    beta2_decay: float = -0.8
    d: float = 1.0  # the largest root mean square of u
    weight_decay: float = 0.0  # decoupled

    powers: ClassVar = {"eps2": 1}

    def __post_init__(self) -> None:
        most = float("inf")
        self.check(eps2=(0, most), beta2_decay=(-most, 0), d=(0, most), weight_decay=(0, most))
        if self.d == 0:
            self.refuse("needs d > 0, got 0")

    def options(self) -> dict[str, Any]:
        return {
            "eps": (EPS1, self.eps2),
            "beta2_decay": self.beta2_decay,
            "d": self.d,
            "weight_decay": self.weight_decay,
        }

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(groups, foreach=True)
