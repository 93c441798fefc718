"""Prodigy: AdamW that estimates its own step size d from how far the factors have come.

    m <- beta1 * m + (1 - beta1) * d * g          v <- beta2 * v + (1 - beta2) * (d g)**2
    q <- beta3 * q + d / d0 * h * <g, theta_0 - theta>      p <- beta3 * p + d / d0 * h * g
    d <- max(d, d_coef * q / |p|_1)                         at first d0
    theta <- (1 - h * weight_decay) * theta - h * m / (sqrt(v) + d * eps)            h = d * lr * b

b corrects for the start of m and v at 0; without `use_bias_correction` it is 1. With
`safeguard_warmup`, h is d in the row of p. Once it has left d0, d grows by at most `growth_rate` a
step. lr is meant to be 1, times a schedule.

d is a size of theta, so d0 moves by s, and lr stays; d * eps and d * weight_decay stay, so eps and
weight_decay move by 1 / s, as theory/optimizers derives.

Reference: Prodigy: An Expeditiously Adaptive Parameter-Free Learner (Mishchenko & Defazio, 2024),
https://arxiv.org/abs/2306.06101
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, POSITIVE, SHARE, Within

# What the package reads from the first group alone, for all of them.
SHARED = (
    "betas",
    "beta3",
    "d0",
    "d_coef",
    "growth_rate",
    "use_bias_correction",
    "safeguard_warmup",
)


@dataclass(frozen=True)
class Prodigy(Optimizer):
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.99)
    beta3: Annotated[float | None, SHARE] = None  # None: sqrt(beta2)
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    # Decoupled; this and the next two as its authors advise
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    use_bias_correction: bool = True
    safeguard_warmup: bool = True
    d0: Annotated[float, POSITIVE] = 1e-6
    d_coef: Annotated[float, POSITIVE] = 1.0
    growth_rate: Annotated[float | None, Within(1, 1e30)] = None  # None: as fast as it likes

    powers: ClassVar = {"d0": 1, "eps": -1, "weight_decay": -1}
    waits: ClassVar = "the package reads d's numerator and denominator of every factor"
    one_scale: ClassVar = "its one step size d, which moves by s, is estimated from all factors"

    def __post_init__(self) -> None:
        most = float("inf")
        self.check(betas=(0, 1), beta3=(0, 1), eps=(0, most), weight_decay=(0, most))
        self.check(d0=(0, most), d_coef=(0, most), growth_rate=(1, most))
        for name in ("eps", "d0", "d_coef"):
            if getattr(self, name) == 0:
                self.refuse(f"needs {name} > 0, got 0")

    def options(self) -> dict[str, Any]:
        growth = float("inf") if self.growth_rate is None else self.growth_rate
        # The package starts these two from its own d0, not from that of a group.
        return super().options() | {"growth_rate": growth, "d": self.d0, "d_max": self.d0}

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for name in SHARED:
            found = list(dict.fromkeys(group[name] for group in groups))
            if len(found) > 1:
                self.refuse(f"has one {name} for all factors, got {found[0]} and {found[1]}")
        rates = list(dict.fromkeys(group["lr"] for group in groups if group["lr"] != 0))
        if len(rates) > 1:
            self.refuse(
                f"has one learning rate for all factors but those at 0, got {rates[0]:g} and "
                f"{rates[1]:g}"
            )
        return self.package("prodigyopt", "prodigyopt").Prodigy(groups)
