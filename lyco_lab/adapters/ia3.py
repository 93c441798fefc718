"""(IA)3: each row of the weight is scaled, or each column.

    W' = (1 + alpha * w) * W    rows: what the layer puts out
    W' = W * (1 + alpha * w)    columns, with `on_input`: what the layer sees, all taps alike

w starts at 0. The bias is not scaled.

Shapes: P outputs, Q inputs; w has one number for each of the one or the other.

Reference:
    Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning
    (Liu et al., 2022), https://arxiv.org/abs/2205.05638
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from lyco_lab.adapters.base import Layer, OfAlpha
from lyco_lab.adapters.kernel import FORM_TOKENS, SIDE_TOKENS, Kernel, Plan, Saved, Sizes
from lyco_lab.adapters.rescale import (
    TOUCH,
    Times,
    along,
    can_undo,
    row_grads,
    scaled_rows,
)
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.linalg import unrolled


@dataclass(frozen=True)
class IA3(OfAlpha):
    on_input: bool = False  # scale the inputs, not the outputs

    file_algo: ClassVar = "ia3"
    file_names: ClassVar = {"w_P": "weight", "w_Q": "weight"}
    scaling: ClassVar = ("w_P", "w_Q")
    zero: ClassVar = ("w_P", "w_Q")
    reads_weight: ClassVar = False

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        name, size = self._factor(tuple(weight.shape))
        return {name: weight.new_zeros(size)}

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        (w,) = factors.values()
        return times(self.alpha, w).view(along(tuple(weight.shape), self.on_input)) * weight

    def change(self, layer: Layer, x: Tensor, factors: Factors) -> Tensor:
        if not layer.multiplies:
            return super().change(layer, x, factors)
        (w,) = factors.values()
        by = Times(times(self.alpha, w))
        if self.on_input:
            return layer.base(layer.inputs(x, by))
        return layer.outputs(layer.base(x), by)

    def kernel(self, shape: Shape) -> "Rows | Columns":
        kind = Columns if self.on_input else Rows
        return kind(shape, self.alpha)

    def _factor(self, shape: Shape) -> tuple[str, int]:
        return ("w_Q", shape[1]) if self.on_input else ("w_P", shape[0])

    def to_file(self, shape: Shape, factors: Factors) -> Factors:
        (w,) = factors.values()
        w = times(self.alpha, w)
        if len(shape) > 2:  # both kinds are laid out as what multiplies the channels of an image
            w = w.view(1, -1, *[1] * (len(shape) - 2))
        return {"weight": w, "on_input": torch.tensor(int(self.on_input), device=w.device)}

    def from_file(self, shape: Shape, tensors: Factors) -> Factors:
        return {self._factor(shape)[0]: tensors["weight"].flatten() / self.alpha}

    def num_params(self, shape: Shape) -> int:
        return self._factor(shape)[1]

    def max_rank(self, shape: Shape) -> int:
        return min(unrolled(shape))


@dataclass(frozen=True)
class Rows(Kernel):
    """y = (1 + gamma w) * (W x) + b, of which y alone is kept."""

    shape: Shape
    gamma: float

    keeps_input = False

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        # Scaling what comes out and what goes back, or the weight there and back.
        outputs = sizes.T * sizes.P * TOUCH
        return {SIDE_TOKENS: 4 * outputs, FORM_TOKENS: 2 * outputs + 4 * sizes.N * TOUCH}

    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        s_P = 1 + times(self.gamma, factors["w_P"])
        if plan.apply == "form" and can_undo(s_P):
            y = op.product(x, self._scaled(weight, s_P), bias)
            return y, (y,)
        y, kept = scaled_rows(op, x, weight, s_P, bias)
        return y, (kept,)

    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        s_P = 1 + times(self.gamma, saved.factors["w_P"])
        gs_P = row_grads(op, gy, saved.kept[0], s_P, saved.bias)
        gx = None
        if need_gx and plan.apply == "form":
            gx = op.grad_input(gy, saved.x_shape, self._scaled(saved.weight, s_P))
        elif need_gx:
            gx = op.grad_input(gy * op.channels(s_P), saved.x_shape, saved.weight)
        return gx, {"w_P": times(self.gamma, gs_P)}

    def _scaled(self, weight: Tensor, s_P: Tensor) -> Tensor:
        return weight * s_P.view(along(self.shape, False))


@dataclass(frozen=True)
class Columns(Kernel):
    """y = W ((1 + gamma w) * x) + b."""

    shape: Shape
    gamma: float

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        return {SIDE_TOKENS: 0.0, FORM_TOKENS: (sizes.N - sizes.T * sizes.Q) * TOUCH}

    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        s_Q = 1 + times(self.gamma, factors["w_Q"])
        if plan.apply == "form":
            return op.product(x, weight * s_Q.view(along(self.shape, True)), bias), ()
        return op.product(x * op.channels(s_Q), weight, bias), ()

    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        gu = op.grad_input(gy, saved.x_shape, saved.weight)  # of u = (1 + gamma w) * x
        gs_Q = op.dots(saved.input(), gu, None)
        s_Q = 1 + times(self.gamma, saved.factors["w_Q"])
        return gu.mul_(op.channels(s_Q)), {"w_Q": times(self.gamma, gs_Q)}


def times(gamma: float, w: Tensor) -> Tensor:
    return w if gamma == 1.0 else gamma * w
