"""Lion: every entry moves by the same amount, along the sign of a mean gradient.

    u = sign(beta1 * m + (1 - beta1) * g)
    theta <- (1 - lr * weight_decay) * theta - lr * u
    m <- beta2 * m + (1 - beta2) * g

A sign has no size, so the learning rate moves by s and weight_decay by 1 / s, as theory/optimizers
derives. A good learning rate is 3 to 10 times smaller than AdamW's, and weight_decay as many times
larger.

Reference: Symbolic Discovery of Optimization Algorithms (Chen et al., 2023),
https://arxiv.org/abs/2302.06675
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE


@dataclass(frozen=True)
class Lion(Optimizer):
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.99)
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1  # decoupled

    powers: ClassVar = {"lr": 1, "weight_decay": -1}

    def __post_init__(self) -> None:
        self.check(betas=(0, 1), weight_decay=(0, float("inf")))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Signs(groups, {})


class Signs(torch.optim.Optimizer):
    """The rule on all factors of a group at once."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            beta1, beta2 = group["betas"]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["mean"] = torch.zeros_like(parameter)
            gradients = [p.grad for p in parameters]
            means = [self.state[p]["mean"] for p in parameters]
            directions = torch._foreach_lerp(means, gradients, 1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            torch._foreach_lerp_(means, gradients, 1 - beta2)
        return loss
