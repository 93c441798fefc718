"""LoRA: the update is a low-rank matrix.

    W' = W + (alpha / R) * B @ A

For a convolution A is a convolution to R channels with the layer's own kernel, and B one of a
single tap from there to the outputs; their composition is B times A unrolled.

Shapes: P outputs, Q inputs, R the rank.

References:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2022),
    https://arxiv.org/abs/2106.09685
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), https://arxiv.org/abs/2309.14859
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from lyco_lab.adapters.base import Factors, Ranked, Shape
from lyco_lab.linalg import kaiming, unrolled


@dataclass(frozen=True)
class LoRA(Ranked):
    rank: int = 8
    alpha: float = 4.0  # the update is scaled by alpha / rank

    file_algo: ClassVar = "lora"
    file_names: ClassVar = {"b_PR": "lora_up.weight", "a_RQ": "lora_down.weight"}

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        shape = tuple(weight.shape)
        P, Q = unrolled(shape)
        R = self.rank_of(shape)
        return {
            # Zero, so that training starts at the pretrained weight; A must not be zero as well,
            # or neither would ever receive a gradient.
            "b_PR": weight.new_zeros(P, R),
            "a_RQ": kaiming(weight, R, *shape[1:], fan_in=Q, rng=rng),
        }

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        return (factors["b_PR"] @ factors["a_RQ"].flatten(1)).view(shape)

    def gamma(self, shape: Shape) -> float:
        return self.alpha_of(shape) / self.rank_of(shape)

    def degree(self, shape: Shape) -> int:
        return 2

    def num_params(self, shape: Shape) -> int:
        return self.rank_of(shape) * sum(unrolled(shape))

    def max_rank(self, shape: Shape) -> int:
        return min(self.rank_of(shape), *unrolled(shape))
