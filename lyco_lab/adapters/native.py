"""Native: the update is the trained weight's difference, every entry of it.

    W' = W + D

Full fine-tuning, written as an adapter that holds the offset and not the weight, so that it
starts, merges and comes off like the others. Biases stay frozen, as they do under the others.
File readers of the LyCORIS family call it "full".

Reference:
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), https://arxiv.org/abs/2309.14859
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from lyco_lab.adapters.base import Additive, Factors, Shape
from lyco_lab.linalg import unrolled


@dataclass(frozen=True)
class Native(Additive):
    file_algo: ClassVar = "full"
    file_names: ClassVar = {"diff": "diff"}

    scaling: ClassVar = ("diff",)

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        return {"diff": weight.new_zeros(weight.shape)}

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        return factors["diff"]

    def gamma(self, shape: Shape) -> float:
        return 1.0

    def degree(self, shape: Shape) -> int:
        return 1

    def num_params(self, shape: Shape) -> int:
        return math.prod(shape)

    def max_rank(self, shape: Shape) -> int:
        return min(unrolled(shape))

    def file_alpha(self, shape: Shape) -> None:
        return None
