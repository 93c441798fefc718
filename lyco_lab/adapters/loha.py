"""LoHa: the update is the elementwise product of two low-rank matrices.

    W' = W + (alpha / R) * (B1 @ A1) * (B2 @ A2)

The update has rank up to R**2, where LoRA with the same R has rank R and half the parameters.
A convolution is unrolled.

Shapes: P outputs, Q inputs (times the taps of a kernel), R the rank of each product.

References:
    FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning
    (Hyeon-Woo et al., 2022), https://arxiv.org/abs/2108.06098
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), https://arxiv.org/abs/2309.14859
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from lyco_lab.adapters.base import Factors, Ranked, Shape
from lyco_lab.linalg import unrolled


@dataclass(frozen=True)
class LoHa(Ranked):
    rank: int = 4
    alpha: float = 2.0  # the update is scaled by alpha / rank

    file_algo: ClassVar = "loha"
    file_names: ClassVar = {
        "b1_PR": "hada_w1_a",
        "a1_RQ": "hada_w1_b",
        "b2_PR": "hada_w2_a",
        "a2_RQ": "hada_w2_b",
    }

    scaling: ClassVar = ("b2_PR",)
    components: ClassVar = {"b2_PR": 1}

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        P, Q = unrolled(tuple(weight.shape))
        R = self.rank_of(tuple(weight.shape))

        def normal(*shape: int, std: float) -> Tensor:
            return weight.new_empty(shape).normal_(std=std, generator=rng)

        # One zero factor makes the update vanish. Zeroing a second one would also zero every
        # gradient, and training could never leave this point.
        return {
            "b1_PR": normal(P, R, std=0.1),
            "a1_RQ": normal(R, Q, std=1.0),
            "b2_PR": weight.new_zeros(P, R),
            "a2_RQ": normal(R, Q, std=1.0),
        }

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        left_PQ = factors["b1_PR"] @ factors["a1_RQ"]
        right_PQ = factors["b2_PR"] @ factors["a2_RQ"]
        return (left_PQ * right_PQ).view(shape)

    def gamma(self, shape: Shape) -> float:
        return self.alpha_of(shape) / self.rank_of(shape)

    def degree(self, shape: Shape) -> int:
        return 4

    def num_params(self, shape: Shape) -> int:
        return 2 * self.rank_of(shape) * sum(unrolled(shape))

    def max_rank(self, shape: Shape) -> int:
        return min(self.rank_of(shape) ** 2, *unrolled(shape))
