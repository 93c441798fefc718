"""What computes an adapter on weights of one shape, and how it says what that costs.

plan.py chooses among a kernel's plans; each adapter's file has the kernels of its rule.
"""

import abc
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lyco_lab.adapters.shapes import Factors, Shape


@dataclass(frozen=True)
class Plan:
    apply: Literal["side", "form"]
    grads: Literal["tokens", "dense"]

    def __str__(self) -> str:
        return f"{self.apply}/{self.grads}"


SIDE_TOKENS = Plan("side", "tokens")
FORM_TOKENS = Plan("form", "tokens")
FORM_DENSE = Plan("form", "dense")


@dataclass(frozen=True)
class Sizes:
    """Of one call: T output positions, a weight of P x Q, its kernel's taps counted in Q."""

    T: int
    P: int
    Q: int

    @property
    def N(self) -> int:
        return self.P * self.Q


@dataclass(frozen=True)
class Saved:
    """What the backward pass has."""

    x: Tensor | None  # None where the kernel keeps its output instead
    x_shape: Shape
    weight: Tensor
    bias: Tensor | None
    factors: Factors
    kept: tuple[Tensor, ...]

    def input(self) -> Tensor:
        assert self.x is not None
        return self.x


class Kernel(abc.ABC):
    """Exact products of one adapter on weights of one shape.

    Made of tensors' operations that need not be differentiable, on float32 or float64.
    """

    keeps_input: bool = True  # False: `forward` keeps its output, from which all can be had
    needs_multiplies: bool = True  # works on linear layers and ungrouped convolutions only
    traceable: bool = True  # torch.compile can see through it

    def keeps(self, plan: Plan) -> bool:
        """Whether the input is kept for the backward pass of this plan."""
        return self.keeps_input

    @abc.abstractmethod
    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        """The plans it has, and what each adds to the frozen layer's two products."""

    @abc.abstractmethod
    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and small tensors that the backward pass will want again."""

    @abc.abstractmethod
    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        """Gradients of the input, if needed, and of the factors."""
