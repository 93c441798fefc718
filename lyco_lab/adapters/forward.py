"""The output of a layer that carries adapters.

One adapter in float32 or float64 is a plan's: W' x + b, see plan.py. What a kernel cannot do (half
precision, in which W + delta would round a small delta away; dropout; several adapters; a base that
can only be called) is computed as

    y = W x + b + sum_i (W_i' - W) u_i            u_i = x, or x with a part dropped

with every change added to the output, and computed at that size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lyco_lab.adapters import geometry, plan
from lyco_lab.adapters.adapted_layer import Adapted
from lyco_lab.adapters.base import Layer
from lyco_lab.adapters.geometry import Geometry
from lyco_lab.adapters.layer_adapter import Mount
from lyco_lab.adapters.plan import HALF, computing_dtype, exact, factor_dtype, formed_grads
from lyco_lab.adapters.shapes import Factors


def apply(layer: Adapted, x: Tensor) -> Tensor:
    """The layer's output with its adapters."""
    mounts = layer.active()
    if not mounts:
        return layer.base_forward(x)
    dtype = computing_dtype(layer.dtype, layer.device)
    (first, *others) = mounts
    fused = not others and dtype not in HALF and not layer.opaque and first.is_plain()
    if not fused:
        return added(layer, mounts, x, dtype)
    op = geometry.of(layer)
    with exact(x):
        weight, bias = layer.frozen_weight, layer.bias_with(first)
        y = plan.product(op, first.adapter, op.enter(x), weight, bias, first.current())
        return op.leave(y, x)


def added(layer: Adapted, mounts: Sequence[Mount], x: Tensor, dtype: torch.dtype) -> Tensor:
    """W x + b + every adapter's change, each added to the output.

    In half precision a change of less than half a step would be lost in a sum with W x, which was
    rounded before. On linear layers the changes go into the sum that W x is, which is then rounded
    once; on others the sum of the two is rounded up or down as often as it is near the one or the
    other, so that every change arrives, if not at every position.
    """
    op = geometry.of(layer)
    norm = isinstance(op, geometry.Normalisation)
    once = dtype in HALF and isinstance(op, geometry.Linear) and not layer.opaque
    y = None if once else layer.base_forward(x)
    with exact(x):
        # bfloat16 has the range of float32; float16 has not, and would lose small entries. What a
        # norm layer computes is cheap.
        wide = dtype == torch.float16 or norm
        frozen = Frozen(layer, factor_dtype(dtype) if wide else dtype)
        total = None
        for mount in mounts:
            u = mount.input(x)
            u = frozen.op.enter(u.to(frozen.dtype) if u.is_floating_point() else u)
            change = mount.scaled(mount.adapter.change(frozen, u, mount.current()))
            offset = mount.offset()
            if offset is not None:  # apart from the bias, in which it could be rounded away
                change = frozen.outputs(change, functools.partial(torch.add, other=offset))
            change = frozen.op.leave(change, x)
            total = change if total is None else total + change
        assert total is not None
        if y is None:
            result: Tensor = Onto.apply(
                total, x.to(dtype), layer.frozen_weight, layer.frozen_bias, dtype
            )
            return result
        if norm and y.dtype in HALF:
            weight, bias = layer.frozen_weight.to(frozen.dtype), layer.frozen_bias
            bias = None if bias is None else bias.to(frozen.dtype)
            return (op.product(x.to(frozen.dtype), weight, bias) + total).to(y.dtype)
        if y.dtype not in HALF:
            return y + total.to(y.dtype)
        rounded: Tensor = Rounded.apply(y.float() + total.float(), y.dtype)
        return rounded


class Rounded(torch.autograd.Function):
    """`dithered`, for gradients a mere change of precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return dithered(x, dtype)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        return gy.float(), None


class Onto(torch.autograd.Function):
    """change + W x + b in half precision, as one sum that is rounded once."""

    @staticmethod
    def forward(
        ctx: Any, change: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = change.dtype
        start = change.to(dtype) if bias is None else dithered(change.float() + bias, dtype)
        y = torch.addmm(geometry.flat(start), geometry.flat(x), weight.to(dtype).t())
        return y.view(change.shape)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        gx = gy @ weight.to(gy.dtype) if ctx.needs_input_grad[1] else None
        return gy.to(ctx.dtype), gx, None, None, None


def dithered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor in half precision, rounded up as often as it is near the upper step.

    By numbers hashed from each entry's place, so always alike. Rounding to the nearest would keep
    nothing of a change much smaller than the bias that it is added to.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13  # bits of the significand
    place = torch.arange(x.numel(), device=x.device, dtype=torch.int32).view(x.shape)
    place = (place ^ (place >> 15)) * 0x2C1B3C6D
    place = (place ^ (place >> 12)) * 0x297A2D39
    bits = x.contiguous().view(torch.int32) + ((place >> 8) & ((1 << dropped) - 1))
    return (bits & -(1 << dropped)).view(torch.float32).to(dtype)


class Frozen(Layer):
    """A layer as `Adapter.change` sees it, computing in one dtype."""

    def __init__(self, layer: Adapted, dtype: torch.dtype) -> None:
        self.layer = layer
        self.dtype = dtype
        self.op: Any = geometry.of(layer)
        self.shape = layer.weight_shape
        self.multiplies = self.op.multiplies or isinstance(self.op, geometry.Convolution)
        self.groups = getattr(self.op, "group_count", 1)

    def weight(self) -> Tensor:
        return self.layer.frozen_weight.to(factor_dtype(self.layer.dtype))

    def base(self, x: Tensor) -> Tensor:
        if self.layer.opaque:
            y, bias = self.layer.base_forward(x), self.layer.frozen_bias
            return (y if bias is None else y - bias).to(x.dtype)
        y = self.op.product(x, self.layer.frozen_weight.to(x.dtype))
        return y

    def formed(self, x: Tensor, form: Callable[[Factors], Tensor], factors: Factors) -> Tensor:
        if plan.is_forced("reference") or torch.compiler.is_compiling():
            weight = form(factors)
            y: Tensor = self.op.product(x, weight.to(self.dtype))
            return y
        y = Formation.apply(self.op, form, tuple(factors), x, *factors.values())
        return y.to(self.dtype)

    def narrow(self, x: Tensor, a_RQ: Tensor) -> Tensor:
        if not isinstance(self.op, geometry.Convolution):
            return x @ a_RQ.to(x.dtype).t()
        count = self.op.group_count
        repeated = a_RQ.to(x.dtype).repeat(count, *[1] * (a_RQ.dim() - 1))
        return self.op.product(x, repeated)

    def widen(self, h: Tensor, b_PR: Tensor) -> Tensor:
        if not isinstance(self.op, geometry.Convolution):
            return h @ b_PR.to(h.dtype).t()
        count, dims = self.op.group_count, len(self.op.stride)
        flat = torch.nn.functional.conv1d(
            h.flatten(2), b_PR.to(h.dtype).unsqueeze(-1), groups=count
        )
        return flat.view(*flat.shape[:2], *h.shape[2:]) if dims else flat

    def narrow_each(self, x: Tensor, a_RT: Tensor, count: int) -> Tensor:
        a_RT = a_RT.to(x.dtype)
        if not isinstance(self.op, geometry.Convolution):
            return (x.unflatten(-1, (count, -1)) @ a_RT.t()).flatten(-2)
        h = self.op.narrow(self.op.groups(x, count), a_RT)
        return h.reshape(x.shape[0], -1, *h.shape[2:])

    def inputs(self, x: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        y: Tensor = self.op.last(apply(self.op.first(x)))
        return y

    def outputs(self, y: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        return self.inputs(y, apply)


class Formation(torch.autograd.Function):
    """V x for V = form(factors), formed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Geometry,
        form: Callable[[Factors], Tensor],
        names: tuple[str, ...],
        x: Tensor,
        *values: Tensor,
    ) -> Tensor:
        ctx.op, ctx.form, ctx.names = op, form, names
        ctx.save_for_backward(x, *values)
        factors = dict(zip(names, values, strict=True))
        return op.product(x, form(factors).to(x.dtype) if x.is_floating_point() else form(factors))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        x, *values = ctx.saved_tensors
        factors = dict(zip(ctx.names, values, strict=True))
        gx, grads = formed_grads(ctx.op, gy, x, ctx.form, factors, ctx.needs_input_grad[3])
        return None, None, None, gx, *(grads.get(name) for name in ctx.names)
