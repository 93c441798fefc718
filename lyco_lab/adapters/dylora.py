"""DyLoRA: a LoRA whose first ranks are trained to do without the later ones.

    W' = W + alpha / b * B[:, :b] @ A[:b]        while training, b new at every step
    W' = W + alpha / R * B @ A                   afterwards: the LoRA that files hold

b is drawn alike from the multiples of `block_size` up to R (R itself where it is none), so each
layer can later be cut to any of these ranks. The scale follows b, as in the paper: the sum's size
stays while its terms come and go. A convolution is two, as in LoRA.

Shapes: P outputs, Q inputs, R the rank.

References:
    DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
    Adaptation (Valipour et al., 2022), https://arxiv.org/abs/2210.07558
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), https://arxiv.org/abs/2309.14859
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Generator, Tensor

from lyco_lab.adapters.base import Layer, Ranked
from lyco_lab.adapters.lowrank import PlainPair
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.linalg import kaiming, unrolled
from lyco_lab.settings import POSITIVE, SIZE


@dataclass(frozen=True)
class DyLoRA(Ranked):
    rank: Annotated[int, SIZE] = 8
    # The update is scaled by alpha / rank, of the ranks in use
    alpha: Annotated[float, POSITIVE] = 4.0
    block_size: Annotated[int, SIZE] = 4  # ranks come and go in blocks of so many

    file_algo: ClassVar = "lora"  # what it trains is one
    file_names: ClassVar = {"b_PR": "lora_up.weight", "a_RQ": "lora_down.weight"}
    scaling: ClassVar = ("b_PR",)
    zero: ClassVar = ("b_PR",)
    components: ClassVar = {"b_PR": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.block_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            self.refuse("block_size", size, "a whole number >= 1")

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        shape = tuple(weight.shape)
        P, Q = unrolled(shape)
        R = self.rank_of(shape)
        return {
            "b_PR": weight.new_zeros(P, R),
            "a_RQ": kaiming(weight, R, *shape[1:], fan_in=Q, rng=rng),
        }

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        return (factors["b_PR"] @ factors["a_RQ"].flatten(1)).view(shape)

    def change(self, layer: Layer, x: Tensor, factors: Factors) -> Tensor:
        if not layer.multiplies:
            return super().change(layer, x, factors)
        gamma = self.gamma(layer.shape)
        return layer.widen(layer.narrow(x, factors["a_RQ"]), gamma * factors["b_PR"])

    def kernel(self, shape: Shape) -> PlainPair:
        return PlainPair(shape, self.gamma(shape), self.rank_of(shape))

    def mask(self, uniforms: Callable[[int], Tensor], size: int) -> Tensor:
        """R / b for the first b of the R ranks, 0 for the others."""
        blocks = -(-size // self.block_size)
        used = ((uniforms(1) * blocks).floor() + 1) * self.block_size
        used = used.clamp(max=size)
        ranks = torch.arange(size, device=used.device)
        return (ranks < used) * (size / used)

    def draws(self) -> bool:
        return True

    def num_params(self, shape: Shape) -> int:
        return self.sized(shape) * sum(unrolled(shape))

    def max_rank(self, shape: Shape) -> int:
        return min(self.rank_of(shape), *unrolled(shape))
