"""What an adapter is: a rule that turns a frozen weight into an adapted one.

    W' = adapted(W, factors)        with    adapted(W, init(W)) = W

An adapter is a value. Its fields are its hyperparameters, so the same class serves as the
study's configuration, the run's label and the object the maths is written on. It holds no
tensors: the trainable factors are passed in, which keeps its methods pure and lets theory/ and
tests/ call them directly. Everything that touches a layer (freezing, precision, merging) lives
once, in mount.py and plan.py.

Most adapters add:

    W' = W + gamma * T(factors)     with    T(c * factors) = c**m * T(factors)

and m, the degree of homogeneity, is what the theorem on gamma asks of them.

Shapes: a weight is (P, Q, *kernel), P outputs and Q inputs, kernel empty for a linear layer.
"""

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Generator, Tensor

from lyco_lab.errors import UserError

Factors = dict[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Adapter(abc.ABC):
    """A rule W -> W', and the claims about it that the paper's tables quote."""

    # How the kohya/LyCORIS file layout calls this rule, and each of its factors.
    file_algo: ClassVar[str]
    file_names: ClassVar[Mapping[str, str]]

    @abc.abstractmethod
    def init(self, weight: Tensor, rng: Generator) -> Factors:
        """Factors at which the adapted weight equals `weight`."""

    @abc.abstractmethod
    def adapted(self, weight: Tensor, factors: Factors) -> Tensor:
        """The adapted weight W', with the shape of `weight`."""

    @abc.abstractmethod
    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """W' - W, without the rounding of a sum with W."""

    @abc.abstractmethod
    def num_params(self, shape: Shape) -> int:
        """Claim: how many trainable scalars the factors of such a weight hold."""

    @abc.abstractmethod
    def max_rank(self, shape: Shape) -> int:
        """Claim: the largest rank the unrolled W' - W can have, which generic factors reach."""

    @abc.abstractmethod
    def file_alpha(self, shape: Shape) -> float | None:
        """The `alpha` that a file carries for such a layer; None where the layout has none."""

    @final
    def check(self, shape: Shape) -> None:
        """Raise an error naming value and remedy where this adapter cannot take such a weight."""
        if len(shape) < 2 or min(shape) < 1:
            raise UserError(
                f"{type(self).__name__} needs a weight of outputs x inputs (x kernel), "
                f"got shape {tuple(shape)}"
            )
        self.num_params(shape)  # an adapter with conditions of its own states them in its sizes

    @final
    def factor_shapes(self, shape: Shape) -> dict[str, Shape]:
        """The shape of each factor of such a weight; allocates none of them."""
        start = self.init(torch.empty(shape, device="meta"), Generator())
        return {name: tuple(factor.shape) for name, factor in start.items()}


@dataclass(frozen=True)
class Additive(Adapter):
    """W' = W + gamma * T(factors), T homogeneous of degree m."""

    @abc.abstractmethod
    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        """T(factors), of the given shape."""

    @abc.abstractmethod
    def gamma(self, shape: Shape) -> float:
        """The constant in front of T."""

    @abc.abstractmethod
    def degree(self, shape: Shape) -> int:
        """Claim: m, with T(c * factors) = c**m * T(factors)."""

    @final
    def adapted(self, weight: Tensor, factors: Factors) -> Tensor:
        shape = tuple(weight.shape)
        return torch.add(weight, self.transform(factors, shape), alpha=self.gamma(shape))

    @final
    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        shape = tuple(weight.shape)
        return self.gamma(shape) * self.transform(factors, shape)


@dataclass(frozen=True)
class Ranked(Additive):
    """An additive adapter whose size is a rank, with gamma = alpha / rank.

    A kernel of one tap is a linear layer in disguise and takes the linear rank; larger kernels
    take `conv_rank` and `conv_alpha` where these are given.
    """

    rank: int
    alpha: float
    conv_rank: int | None = None  # None: rank
    conv_alpha: float | None = None  # None: alpha

    def __post_init__(self) -> None:
        for name in ("rank", "conv_rank"):
            value = getattr(self, name)
            left_out = value is None and name == "conv_rank"
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not left_out and not (whole and value >= 1):
                self.refuse(name, value, "a whole number >= 1")
        for name in ("alpha", "conv_alpha"):
            value = getattr(self, name)
            left_out = value is None and name == "conv_alpha"
            real = isinstance(value, int | float) and math.isfinite(value)
            if not left_out and not (real and value > 0):
                self.refuse(name, value, "a finite number > 0; alpha = rank leaves T unscaled")

    def refuse(self, name: str, value: object, need: str) -> None:
        raise UserError(f"{type(self).__name__} needs {name} to be {need}, got {value!r}")

    @final
    def rank_of(self, shape: Shape) -> int:
        wide = math.prod(shape[2:]) > 1
        return self.conv_rank if wide and self.conv_rank is not None else self.rank

    @final
    def alpha_of(self, shape: Shape) -> float:
        wide = math.prod(shape[2:]) > 1
        return self.conv_alpha if wide and self.conv_alpha is not None else self.alpha

    @final
    def file_alpha(self, shape: Shape) -> float:
        # Readers recompute gamma as alpha / rank, or ignore alpha where they know gamma to be 1.
        return self.gamma(shape) * self.rank_of(shape)
