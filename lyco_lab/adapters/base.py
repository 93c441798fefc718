"""What an adapter is: a rule that turns a frozen weight into an adapted one.

    W' = adapted(W, factors)        with    adapted(W, init(W)) = W

An adapter is a value. Its fields are its hyperparameters, so the same class serves as the
study's configuration, the run's label and the object the maths is written on. It holds no
tensors: the trainable factors are passed in, which keeps its methods pure and lets theory/ and
tests/ call them directly. `delta` is the definition, the one source of W' - W: merging, saving,
norms and every faster way to compute a layer are tested against it. Everything that touches a
layer (freezing, precision, strength, dropouts, merging) lives once, in mount.py and plan.py.

Most adapters add:

    W' = W + gamma * T(factors)     with    T = sum_t T_t,  each T_t linear in each of m factors

`terms` says which those are. So T(c * factors) = c**m * T(factors), m the degree of homogeneity;
and if the factors are scaled each by a number of its own, T is multiplied by g wherever the
product over every term is g. This is what the theorem on gamma asks of an adapter.

Shapes: a weight is (P, Q, *kernel), P outputs and Q inputs, kernel empty for a linear layer. Of a
grouped convolution Q is the inputs of one group. The weight of a norm layer has its own shape.
"""

import abc
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, NoReturn, final

import torch
from torch import Generator, Tensor

from lyco_lab.adapters.kernel import Kernel
from lyco_lab.adapters.shapes import Factors, Shape, Terms
from lyco_lab.errors import UserError
from lyco_lab.settings import POSITIVE, SIZE


@dataclass(frozen=True)
class Adapter(abc.ABC):
    """A rule W -> W', and the claims about it that the paper's tables quote."""

    # How the kohya/LyCORIS file layout calls this rule, and each of its factors.
    file_algo: ClassVar[str]
    file_names: ClassVar[Mapping[str, str]]

    # What it can be put on: "matrix" (linear layers, convolutions, embeddings, projections of
    # attention) or "norm" (layers whose weight multiplies a normalised input entry by entry).
    takes: ClassVar[str] = "matrix"

    # Factors, any of which may be absent, that together scale the change: strength, `use_scalar`
    # and max-norm multiply them. Where that does not turn W' into W + s * (W' - W), as for a
    # rotation, the adapter's own file says what a strength between 0 and 1 then means. Empty:
    # no factor does, and the strength multiplies W' - W itself.
    scaling: ClassVar[tuple[str, ...]] = ()

    # factor -> the axis along which it holds the terms whose sum is T: what rank dropout drops.
    components: ClassVar[Mapping[str, int]] = {}

    # Claim: the factors, any of which may be absent, that `init` leaves at 0.
    zero: ClassVar[tuple[str, ...]] = ()

    # Factors that are part of the rule but do not train.
    untrained: ClassVar[frozenset[str]] = frozenset()

    # Untrained factor -> the one that it is a copy of. They are subtracted from each other where a
    # layer is computed, so only scaled alike do they give the same bits.
    twins: ClassVar[Mapping[str, str]] = {}

    # Whether `change` reads entries of W: False means that it only multiplies by W, through the
    # layer, and so works on a quantised one.
    reads_weight: ClassVar[bool] = True

    # Whether W' - W depends on W at all.
    uses_base: ClassVar[bool] = True

    # Claim: what W' keeps of W. "singular values" is checked by the contract.
    preserves: ClassVar[frozenset[str]] = frozenset()

    # Where there is no such gamma or degree: why.
    no_degree: ClassVar[str] = ""

    @abc.abstractmethod
    def init(self, weight: Tensor, rng: Generator) -> Factors:
        """Factors at which the adapted weight equals `weight`."""

    @abc.abstractmethod
    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """W' - W, without the rounding of a sum with W. The definition."""

    @abc.abstractmethod
    def num_params(self, shape: Shape) -> int:
        """Claim: how many trainable scalars the factors of such a weight hold."""

    @abc.abstractmethod
    def max_rank(self, shape: Shape) -> int:
        """Claim: the largest rank the unrolled W' - W can have, which generic factors reach."""

    @abc.abstractmethod
    def gamma(self, shape: Shape) -> float | None:
        """The constant in front of T; None where there is no such T."""

    @abc.abstractmethod
    def with_gamma(self, gamma: float) -> "Adapter":
        """The same T with this constant in front, at every shape; exact for powers of two."""

    def terms(self, shape: Shape) -> Terms:
        """Claim: T is a sum of terms, each linear in every one of these factors.

        Mostly a single product of all; empty where there is no T.
        """
        return (tuple(self.factor_shapes(shape)),)

    def degree(self, shape: Shape) -> int | None:
        """m, with W' - W of degree m in the factors; None where there is no such m."""
        degrees = {len(term) for term in self.terms(shape)}
        return degrees.pop() if len(degrees) == 1 else None

    @abc.abstractmethod
    def file_alpha(self, shape: Shape) -> float | None:
        """The `alpha` that a file carries for such a layer; None where the layout has none."""

    def to_file(self, shape: Shape, factors: Factors) -> Factors:
        """The tensors that hold these factors in the kohya/LyCORIS layout, by their suffixes.

        Also asked with factors on the meta device, for the shapes that a file must have.
        """
        tensors = {}
        for name, factor in factors.items():
            suffix = self.file_names[name]
            if suffix.endswith(".weight"):  # of a layer of this kind: a convolution has taps
                factor = factor[(..., *[None] * (len(shape) - factor.dim()))]
            tensors[suffix] = factor
        return tensors

    def from_file(self, shape: Shape, tensors: Factors) -> Factors:
        """The factors of which `to_file` made these tensors, whose sizes have been checked."""
        needed = self.factor_shapes(shape)
        return {name: tensors[self.file_names[name]].reshape(needed[name]) for name in needed}

    @property
    def inner(self) -> "Adapter":
        """The rule whose factors `use_scalar` and the dropouts act on: itself, if it wraps none."""
        return self

    def adapted(self, weight: Tensor, factors: Factors) -> Tensor:
        """The adapted weight W', with the shape of `weight`."""
        return weight + self.delta(weight, factors)

    def change(self, layer: "Layer", x: Tensor, factors: Factors) -> Tensor:
        """(W' - W) x, for what kernels cannot do: half precision, dropout, several adapters.

        Differentiable, by operations of `layer` alone; factors are in float32 or float64 whatever
        x is in, and no tensor of W's size may stay alive for the backward pass. The default forms
        W' - W there and back; override it where the change can be had from x without that.
        """
        return layer.formed(x, lambda given: self.delta(layer.weight(), given), factors)

    def kernel(self, shape: Shape) -> Kernel | None:
        """Faster exact products than forming W' by `adapted`; None where none are known."""
        return None

    def mask(self, uniforms: Callable[[int], Tensor], size: int) -> Tensor | None:
        """What multiplies the `size` components at a step of training; None: nothing.

        `uniforms(n)` gives n numbers in [0, 1) that are new at every step.
        """
        return None

    def fitted(self, shape: Shape) -> "Adapter":
        """This adapter with its rank cut down to what such a weight allows, gamma as it was."""
        return self

    def trains_bias(self) -> bool:
        """Whether an offset of the layer's bias is trained as well."""
        return False

    def needs_timestep(self) -> bool:
        """Whether the change depends on the diffusion timestep at which the model is called."""
        return False

    def gate(self, timesteps: Tensor, factors: Factors) -> Tensor:
        """A row per timestep of what multiplies the components then.

        `change` finds it among the factors as "gate". Only for adapters that need the timestep.
        """
        raise TypeError(f"{type(self).__name__} does not depend on the timestep")

    def draws(self) -> bool:
        """Whether `mask` draws at random while training."""
        return False

    @final
    def check(self, shape: Shape) -> None:
        """Raise an error naming value and remedy where this adapter cannot take such a weight."""
        if self.takes == "matrix" and (len(shape) < 2 or min(shape) < 1):
            raise UserError(
                f"{type(self).__name__} needs a weight of outputs x inputs (x kernel), "
                f"got shape {tuple(shape)}"
            )
        if self.inner is not self:
            self.inner.check(shape)
        self.num_params(shape)  # an adapter with conditions of its own states them in its sizes

    @final
    def factor_shapes(self, shape: Shape) -> dict[str, Shape]:
        """The shape of each factor of such a weight; allocates none of them."""
        return dict(_factor_shapes(self, tuple(shape)))

    @final
    def check_scale(self, name: str, hint: str) -> None:
        """Raise an error unless the field can stand in front of T."""
        value = getattr(self, name)
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            self.refuse(name, value, f"a finite number > 0; {hint}")

    @final
    def refuse(self, name: str, value: object, need: str) -> NoReturn:
        raise UserError(f"{type(self).__name__} needs {name} to be {need}, got {value!r}")


@functools.lru_cache(maxsize=4096)
def _factor_shapes(adapter: Adapter, shape: Shape) -> tuple[tuple[str, Shape], ...]:
    start = adapter.init(torch.empty(shape, device="meta"), Generator())
    return tuple((name, tuple(factor.shape)) for name, factor in start.items())


class Layer(abc.ABC):
    """What `change` may ask of a frozen layer. Weights are cast to the dtype of x."""

    shape: Shape
    multiplies: bool  # the layer is x -> W x at each position: linear, or a convolution
    groups: int  # of a convolution, whose outputs of one group see inputs that no others do

    @abc.abstractmethod
    def weight(self) -> Tensor:
        """W, at least in float32."""

    @abc.abstractmethod
    def base(self, x: Tensor) -> Tensor:
        """W x, without the bias."""

    @abc.abstractmethod
    def formed(self, x: Tensor, form: Callable[[Factors], Tensor], factors: Factors) -> Tensor:
        """V x for V = form(factors) of W's shape, which is formed again in the backward pass."""

    @abc.abstractmethod
    def narrow(self, x: Tensor, a_RQ: Tensor) -> Tensor:
        """A x for A with R outputs and W's inputs and kernel. Needs `multiplies`."""

    @abc.abstractmethod
    def widen(self, h: Tensor, b_PR: Tensor) -> Tensor:
        """B h for what `narrow` gave. Needs `multiplies`."""

    @abc.abstractmethod
    def narrow_each(self, x: Tensor, a_RT: Tensor, count: int) -> Tensor:
        """A on each of `count` equal groups of the input's channels, results side by side.

        A has the layer's kernel. Needs `multiplies`, and channels that the layer has not grouped.
        """

    @abc.abstractmethod
    def inputs(self, x: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """`apply`, a map of vectors on the last axis, at each position of an input."""

    @abc.abstractmethod
    def outputs(self, y: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """`apply`, a map of vectors on the last axis, at each position of an output."""


@dataclass(frozen=True)
class Additive(Adapter):
    """W' = W + gamma * T(factors), T independent of W."""

    uses_base = False
    reads_weight = False

    @abc.abstractmethod
    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        """T(factors), of the given shape."""

    @abc.abstractmethod
    def gamma(self, shape: Shape) -> float:
        """The constant in front of T."""

    @final
    def adapted(self, weight: Tensor, factors: Factors) -> Tensor:
        shape = tuple(weight.shape)
        return torch.add(weight, self.transform(factors, shape), alpha=self.gamma(shape))

    @final
    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        shape = tuple(weight.shape)
        return self.gamma(shape) * self.transform(factors, shape)

    def change(self, layer: Layer, x: Tensor, factors: Factors) -> Tensor:
        gamma, shape = self.gamma(layer.shape), layer.shape
        return layer.formed(x, lambda given: gamma * self.transform(given, shape), factors)


@dataclass(frozen=True)
class OfRank(Adapter):
    """An adapter whose size is a rank, with gamma = alpha / rank in front of its change.

    A kernel of one tap is a linear layer in disguise and takes the linear rank; larger kernels
    take `conv_rank` and `conv_alpha` where these are given.
    """

    rank: Annotated[int, SIZE]
    alpha: Annotated[float, POSITIVE]
    conv_rank: Annotated[int | None, SIZE] = None  # None: rank
    conv_alpha: Annotated[float | None, POSITIVE] = None  # None: alpha

    rank_stabilised = False  # where it is a field: gamma = alpha / sqrt(rank)

    def __post_init__(self) -> None:
        for name in ("rank", "conv_rank"):
            value = getattr(self, name)
            left_out = value is None and name == "conv_rank"
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not left_out and not (whole and value >= 1):
                self.refuse(name, value, "a whole number >= 1")
        for name in ("alpha", "conv_alpha"):
            if getattr(self, name) is not None or name == "alpha":
                self.check_scale(name, "alpha = rank leaves T unscaled")

    @final
    def rank_of(self, shape: Shape) -> int:
        return self.conv_rank if _wide(shape) and self.conv_rank is not None else self.rank

    @final
    def alpha_of(self, shape: Shape) -> float:
        return self.conv_alpha if _wide(shape) and self.conv_alpha is not None else self.alpha

    def gamma(self, shape: Shape) -> float:
        return self.alpha_of(shape) / self._divisor(self.rank_of(shape))

    def with_gamma(self, gamma: float) -> "OfRank":
        conv_alpha = None if self.conv_rank is None else gamma * self._divisor(self.conv_rank)
        return replace(self, alpha=gamma * self._divisor(self.rank), conv_alpha=conv_alpha)

    @final
    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rank_stabilised else rank

    def fitted(self, shape: Shape) -> "OfRank":
        most = min(shape[0], math.prod(shape[1:]))
        if self.rank_of(shape) <= most:
            return self
        smaller = replace(self, rank=most, conv_rank=None, alpha=1.0, conv_alpha=None)
        return replace(smaller, alpha=self.gamma(shape) / smaller.gamma(shape))

    def sized(self, shape: Shape) -> int:
        """The rank on such a layer, which must not exceed the sides of the unrolled weight."""
        rank, most = self.rank_of(shape), min(shape[0], math.prod(shape[1:]))
        if rank > most:
            name = "conv_rank" if _wide(shape) and self.conv_rank is not None else "rank"
            self.refuse(name, rank, f"at most {most} here: give this layer a smaller one")
        return rank

    def file_alpha(self, shape: Shape) -> float:
        # Readers recompute gamma as alpha / rank, or ignore alpha where they know gamma to be 1.
        return self.gamma(shape) * self.rank_of(shape)


@dataclass(frozen=True)
class Ranked(OfRank, Additive):
    """An additive adapter whose size is a rank."""


@dataclass(frozen=True, kw_only=True)
class OfAlpha(Adapter):
    """An adapter that has no rank, with gamma = alpha in front of its change.

    Files have no place for it: they hold alpha times the factors, which are then divided by it.
    """

    alpha: Annotated[float, POSITIVE] = 1.0

    def __post_init__(self) -> None:
        self.check_scale("alpha", "1 leaves the change unscaled")

    def gamma(self, shape: Shape) -> float:
        return self.alpha

    def with_gamma(self, gamma: float) -> "OfAlpha":
        return replace(self, alpha=gamma)

    def to_file(self, shape: Shape, factors: Factors) -> Factors:
        return super().to_file(shape, {name: self.alpha * f for name, f in factors.items()})

    def from_file(self, shape: Shape, tensors: Factors) -> Factors:
        factors = super().from_file(shape, tensors)
        return {name: factor / self.alpha for name, factor in factors.items()}

    def file_alpha(self, shape: Shape) -> None:
        return None


def _wide(shape: Shape) -> bool:
    return math.prod(shape[2:]) > 1
