"""How layers multiply: the products that a plan is made of, and their gradients.

    product       y = V x + b              V of the layer's shape, at each output position
    grad_input    V^T gy                   grad_weight    sum gy x^T over positions

and for factors of rank R, A of R x Q (with the layer's kernel) and B of P x R (one tap):

    narrow        h = A x                  widen_         y += c B h, in place
    down          gh = B^T gy              side_          gx += A^T gh, in place
    outer         sum gy h^T

    ride          V^T gy, and B^T V: the rows of B^T ride along as if they were tokens
    dots          sum one * (other - b) over positions, per channel

A position is a token of a linear layer or a pixel of a convolution; T counts the output's. Whether
rank-R activations lie as (T, R) or (R, T) in memory is for the processor: see `rank_first`.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyco_lab.adapters.shapes import Shape

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Geometry(abc.ABC):
    """The products of one kind of layer. These defaults suit any layer linear in its weight."""

    multiplies: ClassVar[bool] = False  # has narrow, widen_ and the others on rank-R activations

    @abc.abstractmethod
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def enter(self, x: Tensor) -> Tensor:
        """The input as `product` takes it."""
        return x

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        """What the layer returns, of what `product` gave for the input `x`."""
        return y

    def tokens(self, x: Tensor, weight: Tensor) -> int:
        """Output positions."""
        return x.numel()

    def grads(self, gy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        """Of input and weight; the input's is None where it has none, as indices do."""
        with torch.enable_grad():
            x, weight = x.detach(), weight.detach().requires_grad_()
            if not x.is_floating_point():
                (gw,) = torch.autograd.grad(self.product(x, weight), weight, gy)
                return None, gw
            gx, gw = torch.autograd.grad(self.product(x.requires_grad_(), weight), [x, weight], gy)
            return gx, gw

    def grad_weight(self, gy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self.grads(gy, x, weight)[1]

    def sum_positions(self, y: Tensor) -> Tensor:
        """The gradient of a bias."""
        return flat(y).sum(0)

    def first(self, y: Tensor) -> Tensor:
        """Channels last in memory or not: (..., channels)."""
        return y

    def last(self, y: Tensor) -> Tensor:
        """Back from `first`."""
        return y


# With AVX-512 a product of few rows is up to three times faster with the rank first, unless they
# fill the vectors; with AVX2, and on a GPU, the tokens go first.
WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"


def rank_first(rank: int) -> bool:
    return WIDE and rank % 16 != 0


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# Entries that are worked on at a time where a product of activations is summed: what a core's own
# cache holds.
BLOCK = 1 << 17


def blocks(x: Tensor, axis: int) -> int:
    """How much of an axis to take at a time; all of it where there is nothing to gain."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, x.shape[axis])
    return max(1, BLOCK * x.shape[axis] // max(1, x.numel()))


@dataclass(frozen=True)
class Linear(Geometry):
    multiplies: ClassVar[bool] = True

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def tokens(self, x: Tensor, weight: Tensor) -> int:
        return x.numel() // x.shape[-1]

    def grad_input(self, gy: Tensor, x_shape: Shape, weight: Tensor) -> Tensor:
        return gy @ weight

    def grad_weight(self, gy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return flat(gy).t() @ flat(x)

    def grads(self, gy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return gy @ weight, self.grad_weight(gy, x, weight)

    def narrow(self, x: Tensor, a_RQ: Tensor) -> Tensor:
        if rank_first(len(a_RQ)):
            return (a_RQ @ flat(x).t()).t()
        return flat(x) @ a_RQ.t()

    def widen_(self, y: Tensor, h: Tensor, b_PR: Tensor, scale: float) -> Tensor:
        flat_y = y.view(-1, y.shape[-1])
        flat_y.addmm_(flat(h), b_PR.t(), alpha=scale)
        return y

    def down(self, gy: Tensor, b_PR: Tensor) -> Tensor:
        rows_RP = b_PR.t().contiguous()
        if rank_first(len(rows_RP)):
            return (rows_RP @ flat(gy).t()).t()
        return flat(gy) @ rows_RP.t()

    def side_(self, gx: Tensor, gh: Tensor, a_RQ: Tensor) -> Tensor:
        gx.view(-1, gx.shape[-1]).addmm_(gh, a_RQ)
        return gx

    def outer(self, gy: Tensor, h: Tensor) -> Tensor:
        return (h.t() @ flat(gy)).t()

    def ride(
        self, gy: Tensor, x_shape: Shape, b_RP: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        tokens = flat(gy)
        T, Q = len(tokens), weight.shape[1]
        if T > Q:  # copying the tokens would cost more
            return gy @ weight, b_RP @ weight
        x = torch.cat([tokens, b_RP]) @ weight
        return x[:T].view(x_shape), x[T:]

    def dots(self, one: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
        one, other = flat(one), flat(other)
        size = blocks(one, 0)
        total = one.new_zeros(one.shape[1])
        for part, of in zip(one.split(size), other.split(size), strict=True):
            total += (part * of if bias is None else (of - bias).mul_(part)).sum(0)
        return total

    def groups(self, x: Tensor, count: int) -> Tensor:
        """Each position's channels as `count` vectors: (T * count, channels / count)."""
        return x.reshape(-1, x.shape[-1] // count)

    def channels(self, v_P: Tensor) -> Tensor:
        """A vector of channels, to be multiplied with an output."""
        return v_P

    def rows(self, y: Tensor) -> Tensor:
        """(channels, positions)."""
        return flat(y).t()

    def unrows(self, rows: Tensor, y_shape: Shape) -> Tensor:
        return rows.t().reshape(y_shape)


@dataclass(frozen=True)
class Convolution(Geometry):
    """A convolution of any dimension with padding by zeros, after `enter` padded otherwise."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # by zeros, on both sides
    dilation: tuple[int, ...]
    group_count: int
    around: tuple[int, ...] = ()  # what F.pad is to add before, where zeros on both sides won't do
    mode: str = "zeros"

    @property
    def multiplies(self) -> bool:  # type: ignore[override]
        return self.group_count == 1

    def enter(self, x: Tensor) -> Tensor:
        if x.dim() == len(self.stride) + 1:
            x = x.unsqueeze(0)
        if self.around:
            x = F.pad(x, self.around, "constant" if self.mode == "zeros" else self.mode)
        return x

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        return y.squeeze(0) if x.dim() == len(self.stride) + 1 else y

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._convolve(x, weight, bias, self.group_count)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        y: Tensor = convolve(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        return y

    def tokens(self, x: Tensor, weight: Tensor) -> int:
        count = x.shape[0]
        for i in range(len(self.stride)):
            reach = self.dilation[i] * (weight.shape[2 + i] - 1) + 1
            count *= (x.shape[2 + i] + 2 * self.padding[i] - reach) // self.stride[i] + 1
        return count

    def _backward(
        self, gy: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool]
    ) -> tuple[Any, Any]:
        gx, gw, _ = torch.ops.aten.convolution_backward(
            gy, x, weight, None, self.stride, self.padding, self.dilation,
            False, [0] * len(self.stride), self.group_count, [*mask, False],
        )  # fmt: skip
        return gx, gw

    def grad_input(self, gy: Tensor, x_shape: Shape, weight: Tensor) -> Tensor:
        # Only the input's shape matters; one element stands for it, so nothing need be kept.
        gx: Tensor = self._backward(gy, gy.new_empty(1).expand(x_shape), weight, (True, False))[0]
        return gx

    def grad_weight(self, gy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        gw: Tensor = self._backward(gy, x, weight, (False, True))[1]
        return gw

    def grads(self, gy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self._backward(gy, x, weight, (True, True))

    def narrow(self, x: Tensor, a_RQ: Tensor) -> Tensor:
        return self._convolve(x, a_RQ, None, 1)

    def widen_(self, y: Tensor, h: Tensor, b_PR: Tensor, scale: float) -> Tensor:
        y.flatten(2).baddbmm_(b_PR.expand(y.shape[0], *b_PR.shape), h.flatten(2), alpha=scale)
        return y

    def down(self, gy: Tensor, b_PR: Tensor) -> Tensor:
        return (b_PR.t() @ gy.flatten(2)).view(gy.shape[0], -1, *gy.shape[2:])

    def side_(self, gx: Tensor, gh: Tensor, a_RQ: Tensor) -> Tensor:
        return gx.add_(self.grad_input(gh, tuple(gx.shape), a_RQ))

    def outer(self, gy: Tensor, h: Tensor) -> Tensor:
        return (gy.flatten(2) @ h.flatten(2).transpose(1, 2)).sum(0)

    def ride(
        self, gy: Tensor, x_shape: Shape, b_RP: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.grad_input(gy, x_shape, weight), b_RP @ weight.flatten(1)

    def dots(self, one: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
        size = blocks(one[0], 0) if len(one) else 1
        total = one.new_zeros(one.shape[1])
        for x, y in zip(one.flatten(2), other.flatten(2), strict=True):
            for first in range(0, len(total), size):
                part, of, into = (z[first : first + size] for z in (x, y, total))
                if bias is not None:
                    of = of - bias[first : first + size, None]
                into += (part * of).sum(1)
        return total

    def groups(self, x: Tensor, count: int) -> Tensor:
        return x.reshape(-1, x.shape[1] // count, *x.shape[2:])

    def channels(self, v_P: Tensor) -> Tensor:
        return v_P.view(-1, *[1] * len(self.stride))

    def rows(self, y: Tensor) -> Tensor:
        return y.transpose(0, 1).reshape(y.shape[1], -1)

    def unrows(self, rows: Tensor, y_shape: Shape) -> Tensor:
        N, P, *sides = y_shape
        return rows.view(P, N, *sides).transpose(0, 1).contiguous()

    def sum_positions(self, y: Tensor) -> Tensor:
        return y.sum((0, *range(2, y.dim())))

    def first(self, y: Tensor) -> Tensor:
        return y.movedim(1, -1)

    def last(self, y: Tensor) -> Tensor:
        return y.movedim(-1, 1)


@dataclass(frozen=True)
class Lookup(Geometry):
    """An embedding: rows of the weight by their numbers."""

    padding_idx: int | None
    scale_grad_by_freq: bool

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


@dataclass(frozen=True)
class Normalisation(Geometry):
    """A norm layer: `scale` is what it does to its input with a weight and a bias."""

    scale: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    channels_first: bool

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.scale(x, weight, bias)

    def first(self, y: Tensor) -> Tensor:
        return y.movedim(1, -1) if self.channels_first else y

    def last(self, y: Tensor) -> Tensor:
        return y.movedim(-1, 1) if self.channels_first else y


def of(layer: nn.Module) -> Geometry:
    """The geometry of a layer, which must be one of those of torch."""
    if isinstance(layer, CONVOLUTIONS):
        around: tuple[int, ...] = ()
        padding = layer.padding
        if layer.padding_mode != "zeros" or isinstance(padding, str):
            # torch keeps what F.pad takes for these; with 'valid' it is all zeros.
            around = tuple(layer._reversed_padding_repeated_twice)
            padding = (0,) * len(layer.stride)
        return Convolution(
            stride=tuple(layer.stride),
            padding=tuple(padding),
            dilation=tuple(layer.dilation),
            group_count=layer.groups,
            around=around if any(around) else (),
            mode=layer.padding_mode,
        )
    if isinstance(layer, nn.Embedding):
        return Lookup(layer.padding_idx, layer.scale_grad_by_freq)
    if isinstance(layer, nn.LayerNorm):
        shape, eps = layer.normalized_shape, layer.eps
        return Normalisation(lambda x, w, b: F.layer_norm(x, shape, w, b, eps), False)
    if isinstance(layer, nn.RMSNorm):
        shape, small = layer.normalized_shape, layer.eps
        return Normalisation(lambda x, w, b: F.rms_norm(x, list(shape), w, small), False)
    if isinstance(layer, nn.GroupNorm):
        count, eps = layer.num_groups, layer.eps
        return Normalisation(lambda x, w, b: F.group_norm(x, count, w, b, eps), True)
    return Linear()
