"""ASGD: SGD whose result is the mean of the factors along the way.

    theta <- (1 - lambd * eta) * theta - eta * (g + weight_decay * theta)
    average <- average + mu * (theta - average)
    eta = lr / (1 + lambd * lr * t)**alpha          mu = 1 / max(1, t - t0)          t = 0, 1, ...

Until step t0 the average is theta itself: torch's default of a million would average nothing.
The step is linear in the gradient, so the learning rate moves by s**2, lambd and weight_decay by
1 / s**2, as theory/optimizers derives.

Reference: Acceleration of Stochastic Approximation by Averaging (Polyak & Juditsky, 1992),
https://doi.org/10.1137/0330046
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, Within


@dataclass(frozen=True)
class ASGD(Optimizer):
    lambd: Annotated[float, NOT_NEGATIVE] = 1e-4
    alpha: Annotated[float, Within(0, 2)] = 0.75
    t0: Annotated[float, Within(0, 10**9)] = 0.0  # the step after which averaging begins
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # added to the gradient

    powers: ClassVar = {"lr": 2, "lambd": -2, "weight_decay": -2}
    averages: ClassVar = True
    waits: ClassVar = "torch reads the step size and the average's share of every factor"

    def __post_init__(self) -> None:
        most = float("inf")
        self.check(lambd=(0, most), alpha=(0, most), t0=(0, most), weight_decay=(0, most))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        # One by one: together, torch keeps the average of factors it does not average yet as
        # average + (theta - average), which is not theta in every bit.
        return Averaged(groups, foreach=False)


class Averaged(torch.optim.ASGD):
    """torch keeps the average in its state, and gives no way to use it."""

    averaged = False  # whether the factors hold the average, and the state what trains

    def eval(self) -> None:
        self._exchange(to_average=True)

    def train(self) -> None:
        self._exchange(to_average=False)

    @torch.no_grad()
    def _exchange(self, to_average: bool) -> None:
        if self.averaged == to_average:
            return
        self.averaged = to_average
        for parameter, state in self.state.items():
            kept = parameter.detach().clone()
            parameter.copy_(state["ax"])
            state["ax"].copy_(kept)
