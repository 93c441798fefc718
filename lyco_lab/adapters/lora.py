"""LoRA: the update is a low-rank matrix.

    W' = W + gamma * B @ A                     gamma = alpha / R, or alpha / sqrt(R) (rsLoRA)
    W' = W + gamma * M  x_1 B  x_2 A           a convolution with `tucker`

For a convolution A is a convolution to R channels with the layer's own kernel, and B one of a
single tap from there to the outputs; their composition is B times A unrolled. In Tucker form A
and B both have a single tap, and a core M of R x R channels has the kernel:

    W'[p, q, k] - W[p, q, k]  =  gamma * sum_rs B[p, r] M[r, s, k] A[s, q]

Shapes: P outputs, Q inputs, R the rank.

References:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2022),
    https://arxiv.org/abs/2106.09685
    A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski, 2023),
    https://arxiv.org/abs/2312.03732
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), https://arxiv.org/abs/2309.14859
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Generator, Tensor

from lyco_lab.adapters.base import Layer, Ranked
from lyco_lab.adapters.lowrank import LowRank
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.linalg import kaiming, through_core, through_core_grads, unrolled
from lyco_lab.settings import POSITIVE, SIZE


@dataclass(frozen=True)
class LoRA(Ranked):
    rank: Annotated[int, SIZE] = 8
    alpha: Annotated[float, POSITIVE] = 4.0  # the update is scaled by alpha / rank
    tucker: bool = False  # convolutions of more than one tap in Tucker form
    rank_stabilised: bool = False  # scale by alpha / sqrt(rank) instead

    file_algo: ClassVar = "lora"
    file_names: ClassVar = {
        "b_PR": "lora_up.weight",
        "a_RQ": "lora_down.weight",
        "m_RRk": "lora_mid.weight",
    }
    scaling: ClassVar = ("b_PR",)
    zero: ClassVar = ("b_PR",)
    components: ClassVar = {"b_PR": 1}

    def has_core(self, shape: Shape) -> bool:
        return self.tucker and math.prod(shape[2:]) > 1

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        shape = tuple(weight.shape)
        P, Q = unrolled(shape)
        R = self.rank_of(shape)
        # Zero, so that training starts at the pretrained weight; the others must not be zero as
        # well, or none would ever receive a gradient.
        zero = {"b_PR": weight.new_zeros(P, R)}
        if not self.has_core(shape):
            return zero | {"a_RQ": kaiming(weight, R, *shape[1:], fan_in=Q, rng=rng)}
        taps = math.prod(shape[2:])
        return zero | {
            "a_RQ": kaiming(weight, R, shape[1], fan_in=shape[1], rng=rng),
            "m_RRk": kaiming(weight, R, R, *shape[2:], fan_in=R * taps, rng=rng),
        }

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        return (factors["b_PR"] @ narrowing(factors).flatten(1)).view(shape)

    def change(self, layer: Layer, x: Tensor, factors: Factors) -> Tensor:
        if not layer.multiplies:
            return super().change(layer, x, factors)
        gamma = self.gamma(layer.shape)
        return layer.widen(layer.narrow(x, narrowing(factors)), gamma * factors["b_PR"])

    def kernel(self, shape: Shape) -> "Pair":
        return Pair(shape, self.gamma(shape), self.rank_of(shape))

    def num_params(self, shape: Shape) -> int:
        R = self.sized(shape)
        if self.has_core(shape):
            return R * (shape[0] + shape[1] + R * math.prod(shape[2:]))
        return R * sum(unrolled(shape))

    def max_rank(self, shape: Shape) -> int:
        R, (P, Q) = self.rank_of(shape), unrolled(shape)
        return min(R, P, Q)


def narrowing(factors: Factors) -> Tensor:
    """A of R x (inputs and kernel); with a core, the core's convolution after A's."""
    a_RQ = factors["a_RQ"]
    if "m_RRk" not in factors:
        return a_RQ
    return through_core(factors["m_RRk"], a_RQ)


@dataclass(frozen=True)
class Pair(LowRank):
    def pair(self, factors: Factors) -> tuple[Tensor, Tensor]:
        return factors["b_PR"], narrowing(factors)

    def pair_grads(self, factors: Factors, gb_PR: Tensor, ga_RQ: Tensor) -> Factors:
        if "m_RRk" not in factors:
            return {"b_PR": gb_PR, "a_RQ": ga_RQ}
        gm_RRk, ga_RQ = through_core_grads(factors["m_RRk"], factors["a_RQ"], ga_RQ)
        return {"b_PR": gb_PR, "a_RQ": ga_RQ, "m_RRk": gm_RRk}
