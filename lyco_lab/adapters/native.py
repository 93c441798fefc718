"""Native: the update is the trained weight's difference, every entry of it.

    W' = W + alpha * D          b' = b + d    with `bias`

Full fine-tuning, written as an adapter that holds the offset and not the weight, so that it
starts, merges and comes off like the others. Biases stay frozen, as they do under the others,
unless `bias` has their offset d trained too. File readers of the LyCORIS family call it "full".

Reference:
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), https://arxiv.org/abs/2309.14859
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lyco_lab.adapters.base import Additive, OfAlpha
from lyco_lab.adapters.kernel import FORM_DENSE, Plan, Sizes
from lyco_lab.adapters.plan import AdditiveKernel
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.linalg import unrolled


@dataclass(frozen=True)
class Native(OfAlpha, Additive):
    bias: bool = False  # train an offset of the bias as well, where the layer has one

    file_algo: ClassVar = "full"
    file_names: ClassVar = {"diff": "diff"}

    scaling: ClassVar = ("diff",)
    zero: ClassVar = ("diff",)

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        return {"diff": weight.new_zeros(weight.shape)}

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        return factors["diff"]

    def kernel(self, shape: Shape) -> "Offset":
        return Offset(self.alpha)

    def num_params(self, shape: Shape) -> int:
        return math.prod(shape)

    def max_rank(self, shape: Shape) -> int:
        return min(unrolled(shape))

    def trains_bias(self) -> bool:
        return self.bias


@dataclass(frozen=True)
class Offset(AdditiveKernel):
    """W + gamma D in one pass; the gradient of D is gamma times that of the weight."""

    gamma: float

    needs_multiplies = False

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        return {FORM_DENSE: sizes.T * sizes.N}

    def form(self, weight: Tensor, factors: Factors, out: Tensor | None = None) -> Tensor:
        return torch.add(weight, factors["diff"], alpha=self.gamma, out=out)

    def dense_grads(self, gw: Tensor, factors: Factors) -> Factors:
        return {"diff": gw if self.gamma == 1.0 else self.gamma * gw}
