"""DoRA: magnitude and direction of each row apart, over an adapter that adds to the weight.

    W' = m * V / |V|            V = W + gamma * T(factors)

|V| holds the length of each row of the unrolled V, or with axis "in" of each column, which is an
input with all its taps; m, which trains too, starts at |W|. With `detached` the gradient takes |V|
as constant: the paper's section 4.3, and what PEFT does.

Written as a change, with s = m / |V| and without a difference of two numbers that are nearly equal:

    W' - W = (s - 1) W + s gamma T
    s - 1  = ((m - |W|) - (|V| - |W|)) / |V|
    |V| - |W| = sum (2 W + gamma T) gamma T / (|V| + |W|)

A row of zeros has no direction: there s is 1 while V is 0 as well. The strength multiplies W' - W.

Shapes: P outputs, Q inputs.

Reference:
    DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024), https://arxiv.org/abs/2402.09353
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lyco_lab.adapters import plan
from lyco_lab.adapters.base import Adapter, Additive, Layer
from lyco_lab.adapters.rescale import Normalised, Times, along, norms, ratio, sums
from lyco_lab.adapters.shapes import Factors, Shape, Terms
from lyco_lab.errors import UserError, nearest
from lyco_lab.linalg import unrolled

MAGNITUDE = "magnitude"
AXES = ("out", "in")


def _lora() -> Adapter:
    from lyco_lab.adapters import ADAPTERS  # not at the top, where they are being found

    return ADAPTERS["lora"]()


@dataclass(frozen=True)
class DoRA(Adapter):
    of: Adapter = field(default_factory=_lora)  # what adds to the weight
    axis: str = "out"  # a magnitude per output, or per input: "in"
    detached: bool = False  # no gradient through the norms

    no_degree: ClassVar = (
        "it is homogeneous in the magnitude alone; the norm undoes the scale of the other factors"
    )

    def __post_init__(self) -> None:
        need = "an adapter that adds to the weight, such as lora, loha, lokr or native"
        if not isinstance(self.of, Additive) or self.of.takes != "matrix":
            self.refuse("of", self.of, need)
        if self.of.needs_timestep():
            self.refuse("of", self.of, f"{need}: W' is not one weight where it depends on the time")
        if self.axis not in AXES:
            hint = nearest(str(self.axis), AXES)
            raise UserError(f"DoRA needs axis to be 'out' or 'in', got {self.axis!r}{hint}")

    @property
    def inner(self) -> Adapter:
        return self.of

    @property
    def file_algo(self) -> str:  # type: ignore[override]
        return self.of.file_algo

    @property
    def file_names(self) -> Mapping[str, str]:  # type: ignore[override]
        return {**self.of.file_names, MAGNITUDE: "dora_scale"}

    @property
    def zero(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.of.zero

    @property
    def untrained(self) -> frozenset[str]:  # type: ignore[override]
        return self.of.untrained

    @property
    def twins(self) -> Mapping[str, str]:  # type: ignore[override]
        return self.of.twins

    @property
    def columns(self) -> bool:
        return self.axis == "in"

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        m = norms(weight, self.columns).view(along(tuple(weight.shape), self.columns))
        return {**self.of.init(weight, rng), MAGNITUDE: m}

    def adapted(self, weight: Tensor, factors: Factors) -> Tensor:
        # Not W + delta, which cancels where m is small.
        formed, m = self.of.adapted(weight, _without(factors)), factors[MAGNITUDE]
        n = norms(formed, self.columns)
        s = ratio(m.flatten(), n.detach() if self.detached else n)
        return s.view_as(m) * formed

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        change = self.of.delta(weight, _without(factors))
        excess, scale = self.scales(weight, change, factors[MAGNITUDE])
        return excess * weight + scale * change

    def scales(self, weight: Tensor, change: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """s - 1 and s, in the shape of m: each exact where it is small."""
        n_W, n = (norms(one, self.columns) for one in (weight, weight + change))
        more = sums((2 * weight + change) * change, self.columns)
        empty = n == 0
        growth = more / torch.where(empty, 1.0, n + n_W)
        if self.detached:
            growth, n = growth.detach(), n.detach()
        scale = ratio(m.flatten(), n)
        excess = ((m.flatten() - n_W) - growth) / torch.where(empty, 1.0, n)
        return torch.where(empty, 0.0, excess).view_as(m), scale.view_as(m)

    def change(self, layer: Layer, x: Tensor, factors: Factors) -> Tensor:
        if not layer.multiplies:
            return super().change(layer, x, factors)

        rest = _without(factors)
        seen = {name: f.detach() for name, f in rest.items()} if self.detached else rest

        def scales(*values: Tensor) -> Tensor:
            *inner, m = values
            weight = layer.weight()
            change = self.of.delta(weight, dict(zip(rest, inner, strict=True)))
            return torch.stack([by.flatten() for by in self.scales(weight, change, m)])

        excess, scale = plan.recomputed(scales, *seen.values(), factors[MAGNITUDE])
        if self.columns:
            z = layer.base(layer.inputs(x, Times(excess)))
            return z + self.of.change(layer, layer.inputs(x, Times(scale)), rest)
        z = layer.outputs(layer.base(x), Times(excess))
        return z + layer.outputs(self.of.change(layer, x, rest), Times(scale))

    def kernel(self, shape: Shape) -> Normalised | None:
        kernel = self.of.kernel(shape)
        if not isinstance(kernel, plan.AdditiveKernel):
            return None
        return Normalised(shape, kernel, MAGNITUDE, self.columns, self.detached)

    def gamma(self, shape: Shape) -> float | None:
        return self.of.gamma(shape)

    def with_gamma(self, gamma: float) -> "DoRA":
        return replace(self, of=self.of.with_gamma(gamma))

    def terms(self, shape: Shape) -> Terms:
        return self.of.terms(shape)

    def degree(self, shape: Shape) -> None:
        return None

    def num_params(self, shape: Shape) -> int:
        return self.of.num_params(shape) + shape[1 if self.columns else 0]

    def max_rank(self, shape: Shape) -> int:
        return min(unrolled(shape))  # s - 1 is diagonal and generic, and so is W

    def file_alpha(self, shape: Shape) -> float | None:
        return self.of.file_alpha(shape)

    def fitted(self, shape: Shape) -> "DoRA":
        return replace(self, of=self.of.fitted(shape))

    def trains_bias(self) -> bool:
        return self.of.trains_bias()


def _without(factors: Factors) -> Factors:
    """The factors of the adapter within."""
    return {name: factor for name, factor in factors.items() if name != MAGNITUDE}
