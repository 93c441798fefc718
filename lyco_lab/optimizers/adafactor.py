"""Adafactor: steps relative to theta's size; of a matrix's squares only means of rows and columns.

    b = t**beta2_decay
    r <- r + b * (mean of g**2 along rows - r)          c: along columns
    v = r c' / mean(r)                                  of a vector: v <- v + b * (g**2 - v)
    u = g / sqrt(v)                                     u <- u / max(1, rms(u) / d)
    theta <- (1 - lr * weight_decay) * theta - max(eps2, rms(theta)) * min(lr, 1 / sqrt(t)) * u

u does not depend on the size of the gradient, and the step is in units of theta already: the
learning rate stays, as does weight_decay, and eps2, a size of theta, moves by s, as
theory/optimizers derives.

Where v is 0, so is g, and u. torch's own bounds mean(r) and v from below instead, the one by its
eps1 and the other by eps1**2, which move by 1 / s**2 both, and one eps1 cannot follow; and it forms
r c', fourth powers of gradients, in float32. The gradients of an adapter that has just begun are
down to 1e-16 in places, and meet both. So here means are taken in float64 and kept as their roots,
whose range is that of g.

Reference: Adafactor: Adaptive Learning Rates with Sublinear Memory Cost (Shazeer & Stern, 2018),
https://arxiv.org/abs/1804.04235
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, POSITIVE, Within


@dataclass(frozen=True)
class Adafactor(Optimizer):
    # The least size of theta that a step is relative to
    eps2: Annotated[float, NOT_NEGATIVE] = 1e-3
    beta2_decay: Annotated[float, Within(-100, 0)] = -0.8
    d: Annotated[float, POSITIVE] = 1.0  # the largest root mean square of u
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # decoupled

    powers: ClassVar = {"eps2": 1}

    def __post_init__(self) -> None:
        most = float("inf")
        self.check(eps2=(0, most), beta2_decay=(-most, 0), d=(0, most), weight_decay=(0, most))
        if self.d == 0:
            self.refuse("needs d > 0, got 0")

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Relative(groups, {})


class Relative(torch.optim.Optimizer):
    """The rule, factor by factor; those with more than two axes as stacks of matrices."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for theta in group["params"]:
                if theta.grad is not None:
                    self._move(theta, theta.grad, group)
        return loss

    def _move(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[theta]
        t = state["step"] = state.get("step", 0) + 1
        b = t ** group["beta2_decay"]
        size = rms(theta.double())
        if g.dim() > 1:
            rows, columns = (_mean(state, name, g, b, axis) for name, axis in AXES.items())
            root_v = rows * columns / rows.square().mean(-2, keepdim=True).sqrt()
        else:
            root_v = _mean(state, "entries", g, b, ())
        u = torch.where(root_v > 0, g / root_v, 0.0)
        u = u / (rms(u) / group["d"]).clamp(min=1.0)
        lr = group["lr"]
        theta.mul_(1 - lr * group["weight_decay"])
        theta.sub_((size.clamp(min=group["eps2"]) * min(lr, t**-0.5) * u).to(theta.dtype))


AXES = {"rows": -1, "columns": -2}  # the axis along which a mean is taken


def _mean(state: dict[str, Any], name: str, g: Tensor, b: float, axis: int | tuple[()]) -> Tensor:
    """The root of the mean square along `axis`, moved by b towards that of g."""
    square = g.double().square()
    if axis != ():
        square = square.mean(axis, keepdim=True)
    kept = state.setdefault(name, g.new_zeros(square.shape))
    kept.copy_(kept.double().square().lerp(square, b).sqrt())
    return kept.double()


def rms(x: Tensor) -> Tensor:
    """The root mean square; a number that stays on its device."""
    return x.square().mean().sqrt()
