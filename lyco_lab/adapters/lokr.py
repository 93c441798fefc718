"""LoKr: the update is a Kronecker product of a small block and a larger one.

    W' = W + C (x) D                             where D is kept as a full matrix
    W' = W + (alpha / R) * C (x) (B @ A)         where D is factored, at rank R

Outputs and inputs are split as P = U V and Q = S T, with U and S the largest divisors that exceed
neither `factor` nor the square root; C is U x S, the right block V x T. A kernel's taps stay in
the right block. That block is kept full where the rank would save nothing, R >= max(V, T) / 2,
and then alpha has no meaning and is ignored: the scale is 1. A very large rank asks for full
blocks everywhere, as all of the paper's runs do.

References:
    KronA: Parameter Efficient Tuning with Kronecker Adapter (Edalati et al., 2022),
    https://arxiv.org/abs/2212.10650
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), https://arxiv.org/abs/2309.14859, section 3.2 and equation 5
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from lyco_lab.adapters.base import Factors, Ranked, Shape
from lyco_lab.errors import UserError
from lyco_lab.linalg import kaiming, kron, split


@dataclass(frozen=True)
class LoKr(Ranked):
    rank: int = 10000  # as large as this: the right block is a full matrix
    alpha: float = 1.0  # the update is scaled by alpha / rank where the right block is factored
    factor: int = 8  # the left block has at most this many rows and columns
    full_matrix: bool = False  # keep the right block full whatever the rank

    file_algo: ClassVar = "lokr"
    file_names: ClassVar = {
        "c_US": "lokr_w1",
        "d_VT": "lokr_w2",
        "b_VR": "lokr_w2_a",
        "a_RT": "lokr_w2_b",
    }

    scaling: ClassVar = ("c_US",)
    components: ClassVar = {"b_VR": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.factor, bool) or not isinstance(self.factor, int) or self.factor < 2:
            self.refuse("factor", self.factor, "a whole number >= 2")

    def sizes(self, shape: Shape) -> tuple[int, int, int, int]:
        """(U, V, S, T) of a weight."""
        for side, size in zip(("outputs", "inputs"), shape, strict=False):
            if split(size, self.factor)[0] == 1:
                divisor = next((d for d in range(2, math.isqrt(size) + 1) if size % d == 0), None)
                remedy = f"a factor of at least {divisor}, or " if divisor else ""
                raise UserError(
                    f"LoKr with factor {self.factor} cannot split {size} {side} into two blocks: "
                    f"it needs {remedy}this layer left out"
                )
        return *split(shape[0], self.factor), *split(shape[1], self.factor)

    def is_full(self, shape: Shape) -> bool:
        _, V, _, T = self.sizes(shape)
        return self.full_matrix or 2 * self.rank_of(shape) >= max(V, T)

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        shape = tuple(weight.shape)
        U, V, S, T = self.sizes(shape)
        c_US = kaiming(weight, U, S, fan_in=S, rng=rng)
        if self.is_full(shape):
            return {"c_US": c_US, "d_VT": weight.new_zeros(V, T, *shape[2:])}
        R = self.rank_of(shape)
        return {
            "c_US": c_US,
            "b_VR": kaiming(weight, V, R, fan_in=R, rng=rng),
            "a_RT": weight.new_zeros(R, T * math.prod(shape[2:])),
        }

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        if "d_VT" in factors:
            return kron(factors["c_US"], factors["d_VT"])
        right_VT = factors["b_VR"] @ factors["a_RT"]
        return kron(factors["c_US"], right_VT).view(shape)

    def gamma(self, shape: Shape) -> float:
        return 1.0 if self.is_full(shape) else self.alpha_of(shape) / self.rank_of(shape)

    def degree(self, shape: Shape) -> int:
        return 2 if self.is_full(shape) else 3

    def num_params(self, shape: Shape) -> int:
        U, V, S, T = self.sizes(shape)
        taps = math.prod(shape[2:])
        right = V * T * taps if self.is_full(shape) else self.rank_of(shape) * (V + T * taps)
        return U * S + right

    def max_rank(self, shape: Shape) -> int:
        U, V, S, T = self.sizes(shape)
        right = min(V, T * math.prod(shape[2:]))
        return min(U, S) * (right if self.is_full(shape) else min(right, self.rank_of(shape)))
