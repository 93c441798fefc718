"""Schedule-free AdamW: instead of a falling learning rate, an average that always is up to date.

    y = (1 - beta1) * z + beta1 * x           where the gradient g is taken: what trains
    v <- beta2 * v + (1 - beta2) * g**2       v^: corrected for its start at 0
    z <- z - lr * (g / (sqrt(v^) + eps) + weight_decay * y)
    x <- (1 - c) * x + c * z                  what is used: c = w_t / (w_1 + ... + w_t),
                                              w_t = t**r * (largest lr so far)**weight_lr_power

g / (sqrt(v^) + eps) does not depend on the size of the gradient, and c not on that of lr, so the
learning rate moves by s, eps and weight_decay by 1 / s, as theory/optimizers derives.

Reference: The Road Less Scheduled (Defazio et al., 2024), https://arxiv.org/abs/2405.15682
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE, Within


@dataclass(frozen=True)
class ScheduleFree(Optimizer):
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.99)
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    r: Annotated[float, Within(0, 10)] = 0.0
    weight_lr_power: Annotated[float, Within(0, 10)] = 2.0

    powers: ClassVar = {"lr": 1, "eps": -1, "weight_decay": -1}
    averages: ClassVar = True

    def __post_init__(self) -> None:
        most = float("inf")
        self.check(betas=(0, 1), eps=(0, most), weight_decay=(0, most), r=(0, most))
        self.check(weight_lr_power=(0, most))
        if self.betas[0] == 0:
            self.refuse("needs betas[0] > 0, without which y keeps no trace of x, got 0")

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        package = self.package("schedulefree", "schedulefree")

        class Reversible(package.AdamWScheduleFree):  # type: ignore[name-defined, misc]
            """The package finds y from x again; this gives it back in every bit."""

            kept: list[Tensor] = []

            @torch.no_grad()
            def eval(self) -> None:
                if self.param_groups[0]["train_mode"]:
                    self.kept = [p.detach().clone() for p in self.all()]
                super().eval()

            @torch.no_grad()
            def train(self) -> None:
                super().train()
                if self.kept:
                    for parameter, kept in zip(self.all(), self.kept, strict=True):
                        parameter.copy_(kept)
                self.kept = []

            def all(self) -> list[Tensor]:
                return [p for group in self.param_groups for p in group["params"]]

        made = Reversible(groups, foreach=True)
        made.train()
        return made
