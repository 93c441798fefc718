"""Norm: the scale and the offset of a norm layer, trained.

    w' = w + alpha * dw         b' = b + db    where the layer has an offset

A norm layer normalises its input and multiplies it by w, entry by entry; the shape of w is the
layer's: a vector of channels, or several axes of a LayerNorm. A run trains norms beside its own
adapter with `model.train_norm`, as LyCORIS calls it too; lyco_lab/diffusion/targets.py says which.

Reference:
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), https://arxiv.org/abs/2309.14859
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from lyco_lab.adapters.base import Additive, OfAlpha
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.linalg import unrolled


@dataclass(frozen=True)
class Norm(OfAlpha, Additive):
    file_algo: ClassVar = "norm"
    file_names: ClassVar = {"dw": "w_norm"}

    takes: ClassVar = "norm"
    scaling: ClassVar = ("dw",)
    zero: ClassVar = ("dw",)

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        return {"dw": weight.new_zeros(weight.shape)}

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        return factors["dw"]

    def num_params(self, shape: Shape) -> int:
        return math.prod(shape)

    def max_rank(self, shape: Shape) -> int:
        return min(unrolled(shape))  # 1 for a vector, which unrolls to one column

    def trains_bias(self) -> bool:
        return True
