"""Rprop: only the gradient's sign is used; each entry has a step size of its own.

    step <- step * etas[1]   where the sign of g stays        and within step_sizes
    step <- step * etas[0]   where it changes; then g = 0
    theta <- theta - step * sign(g)

The first step size is the learning rate, which is not read again: a schedule has no effect after
the first step. Meant for gradients of the whole data set, whose signs carry no noise. Steps do not
depend on the size of the gradient, so the learning rate and step_sizes move by s, as
theory/optimizers derives.

Reference: A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm
(Riedmiller & Braun, 1993), https://doi.org/10.1109/ICNN.1993.298623
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE


@dataclass(frozen=True)
class Rprop(Optimizer):
    etas: Annotated[tuple[float, float], NOT_NEGATIVE] = (0.5, 1.2)
    step_sizes: Annotated[tuple[float, float], NOT_NEGATIVE] = (
        1e-6,
        50.0,
    )  # the least and the largest

    powers: ClassVar = {"lr": 1, "step_sizes": 1}

    def __post_init__(self) -> None:
        self.check(etas=(0, float("inf")), step_sizes=(0, float("inf")))
        if not 0 < self.etas[0] < 1 < self.etas[1]:
            self.refuse(f"needs etas with 0 < first < 1 < second, got {self.etas}")
        if not self.step_sizes[0] <= self.step_sizes[1]:
            self.refuse(f"needs step_sizes with first <= second, got {self.step_sizes}")

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Rprop(groups, foreach=True)
