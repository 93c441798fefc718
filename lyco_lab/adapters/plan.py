"""How an adapted layer is computed: exactly, and at the least cost.

Two choices are independent of each other, for every kernel and every call:

    apply   side   y = W x + (change of x through the factors)     nothing of W's size is formed
            form   y = W' x                                        W' is formed there and back
    grads   tokens the factors' gradients by products over tokens
            dense  through G = sum gy x^T, of W's size, then the factors

All are exact: they give the layer's output with the adapted weight and the gradients of the
factors, and differ only in cost. `choose` picks for each layer and call, from the number of tokens
and the sizes alone, by counting multiply-adds with two constants: PASS, what touching an entry of
a weight once more costs, and SKINNY, how much slower a product of few rows runs than a square one.

Nothing of a weight's size is kept for the backward pass: `Exact` keeps the input (or the output,
where the change can be undone) and the factors, and forms W' again. A backward pass that is itself
differentiated goes by plain autograd, as does everything within `forced("reference")`.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lyco_lab.adapters import geometry
from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.geometry import Geometry
from lyco_lab.adapters.kernel import (
    FORM_DENSE,
    Kernel,
    Plan,
    Saved,
    Sizes,
)
from lyco_lab.adapters.shapes import Factors, Shape

HALF = (torch.bfloat16, torch.float16)

# In multiply-adds of a large product, fitted once on one core with AVX-512.
PASS = 40.0


def skinny(rank: int) -> float:
    """How much more a multiply-add costs in a product of `rank` rows. 3 at 1, 1 from 64."""
    return max(1.0, 3.0 - rank / 32)


@dataclass(frozen=True)
class Formed(Kernel):
    """The kernel of an adapter that has none: W' and its gradient by the definition."""

    adapter: Adapter

    needs_multiplies = False
    traceable = False

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        return {FORM_DENSE: 0.0}

    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return op.product(x, self.adapter.adapted(weight, factors), bias), ()

    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        def adapted(factors: Factors) -> Tensor:
            return self.adapter.adapted(saved.weight, factors)

        return formed_grads(op, gy, saved.input(), adapted, saved.factors, need_gx)


def formed_grads(
    op: Any,
    gy: Tensor,
    x: Tensor,
    form: Callable[[Factors], Tensor],
    factors: Factors,
    need_gx: bool,
) -> tuple[Tensor | None, Factors]:
    """Gradients of form(factors) x, by autograd through `form` alone."""
    with torch.enable_grad():
        given = {name: factor.detach().requires_grad_() for name, factor in factors.items()}
        weight = form(given)
    cut = weight.detach().to(gy.dtype)
    gx, gw = op.grads(gy, x, cut) if need_gx else (None, op.grad_weight(gy, x, cut))
    grads = torch.autograd.grad(
        weight, list(given.values()), gw.to(weight.dtype), allow_unused=True
    )
    return gx, {n: g for n, g in zip(given, grads, strict=True) if g is not None}


class AdditiveKernel(Kernel):
    """W' = W + gamma T, formed: what is left to say is how, and what comes of the gradient."""

    @abc.abstractmethod
    def form(self, weight: Tensor, factors: Factors, out: Tensor | None = None) -> Tensor:
        """W', in as few passes over it as possible; into `out`, which may be W itself."""

    @abc.abstractmethod
    def dense_grads(self, gw: Tensor, factors: Factors) -> Factors:
        """The factors' gradients from G, of W's shape, which may be overwritten."""

    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return op.product(x, self.form(weight, factors), bias), ()

    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        x, weight, factors = saved.input(), saved.weight, saved.factors
        if not need_gx:
            return None, self.dense_grads(op.grad_weight(gy, x, weight), factors)
        gx, gw = op.grads(gy, x, self.form(weight, factors))
        return gx, self.dense_grads(gw, factors)


class TokenKernel(AdditiveKernel):
    """One whose T also acts on tokens without being formed."""

    @abc.abstractmethod
    def side_(self, op: Any, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """y += gamma T x, in place."""

    @abc.abstractmethod
    def token_grads(
        self, op: Any, gy: Tensor, x: Tensor, factors: Factors, gx: Tensor | None
    ) -> Factors:
        """The factors' gradients by products over tokens; gx += gamma T^T gy where it is given."""

    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if plan.apply == "form":
            return super().forward(op, plan, x, weight, bias, factors)
        return self.side_(op, op.product(x, weight, bias), x, factors), ()

    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        if plan.grads == "dense":
            return super().backward(op, plan, gy, saved, need_gx)
        x, factors = saved.input(), saved.factors
        if not need_gx:
            return None, self.token_grads(op, gy, x, factors, None)
        if plan.apply == "form":
            gx = op.grad_input(gy, saved.x_shape, self.form(saved.weight, factors))
            return gx, self.token_grads(op, gy, x, factors, None)
        gx = op.grad_input(gy, saved.x_shape, saved.weight)
        return gx, self.token_grads(op, gy, x, factors, gx)


class Exact(torch.autograd.Function):
    """A kernel as autograd sees it."""

    @staticmethod
    def forward(
        ctx: Any,
        call: "Call",
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *values: Tensor,
    ) -> Tensor:
        factors = dict(zip(call.names, values, strict=True))
        y, kept = call.kernel.forward(call.op, call.plan, x, weight, bias, factors)
        ctx.call, ctx.x_shape, ctx.keeps = call, tuple(x.shape), call.kernel.keeps(call.plan)
        ctx.save_for_backward(x if ctx.keeps else None, weight, bias, *values, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        call: Call = ctx.call
        x, weight, bias, *rest = ctx.saved_tensors
        values, kept = rest[: len(call.names)], tuple(rest[len(call.names) :])
        need_gx, need_gb = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        if torch.is_grad_enabled():
            return Exact.differentiable(ctx, call, gy, x, weight, bias, values)
        saved = Saved(
            x, ctx.x_shape, weight, bias, dict(zip(call.names, values, strict=True)), kept
        )
        gx, grads = call.kernel.backward(call.op, call.plan, gy, saved, need_gx)
        gb = call.op.sum_positions(gy) if need_gb else None
        return None, gx, None, gb, *(grads.get(name) for name in call.names)

    @staticmethod
    def differentiable(
        ctx: Any,
        call: "Call",
        gy: Tensor,
        x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        values: Sequence[Tensor],
    ) -> Any:
        """The same gradients by plain autograd, for a backward pass that is differentiated."""
        if x is None:
            raise RuntimeError(
                f"{call.adapter} keeps its output, not its input, for the backward pass, which so "
                "cannot be differentiated: run the layer inside plan.forced('reference')"
            )
        factors = dict(zip(call.names, values, strict=True))
        y = call.op.product(x, call.adapter.adapted(weight, factors), bias)
        inputs = [x, weight, bias, *values]
        needed = ctx.needs_input_grad[1:]
        wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
        grads = iter(torch.autograd.grad(y, wanted, gy, create_graph=True, allow_unused=True))
        return None, *(next(grads) if need else None for need in needed)


@dataclass(frozen=True)
class Call:
    """What of one call is no tensor."""

    kernel: Kernel
    op: Geometry
    plan: Plan
    names: tuple[str, ...]
    adapter: Adapter


_forced: Plan | Literal["reference"] | None = None


@contextlib.contextmanager
def forced(plan: Plan | Literal["reference"]) -> Iterator[None]:
    """This plan wherever a kernel has it; "reference": the layer with W', by plain autograd."""
    global _forced
    before, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = before


def is_forced(plan: Plan | Literal["reference"]) -> bool:
    return _forced == plan


def choose(costs: dict[Plan, float]) -> Plan:
    """The cheapest plan, or the forced one where it is among them."""
    if isinstance(_forced, Plan) and _forced in costs:
        return _forced
    cheapest = next(iter(costs))  # a loop, as torch.compile does not see through min with a key
    for plan, cost in costs.items():
        if cost < costs[cheapest]:
            cheapest = plan
    return cheapest


def kernel_of(adapter: Adapter, op: Geometry, shape: Shape) -> Kernel:
    """The adapter's kernel for such a layer."""
    kernel = adapter.kernel(shape)
    if kernel is None or (kernel.needs_multiplies and not op.multiplies):
        return Formed(adapter)
    return kernel


def product(
    op: Geometry, adapter: Adapter, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
) -> Tensor:
    """W' x + b by the cheapest plan."""
    shape = tuple(weight.shape)
    kernel = kernel_of(adapter, op, shape)
    by_hand = torch.compiler.is_compiling() and not kernel.traceable
    if _forced == "reference" or by_hand or isinstance(op, geometry.Normalisation):
        return op.product(x, adapter.adapted(weight, factors), bias)
    sizes = Sizes(op.tokens(x, weight), shape[0], weight[0].numel())
    call = Call(kernel, op, choose(kernel.costs(sizes)), tuple(factors), adapter)
    y: Tensor = Exact.apply(call, x, weight, bias, *factors.values())
    return y


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), of which only the arguments are kept: it runs again to go back."""
    if torch.compiler.is_compiling():
        return function(*tensors)
    result: Tensor = Recomputed.apply(function, *tensors)
    return result


class Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            given = [
                tensor.detach().requires_grad_(need)
                for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            result = ctx.function(*given)
        wanted = [tensor for tensor in given if tensor.requires_grad]
        grads = iter(torch.autograd.grad(result, wanted, grad))
        return None, *(next(grads) if need else None for need in needed)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which factors and W' - W are formed."""
    return torch.promote_types(dtype, torch.float32)


def computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision that the layer's product will run in."""
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def exact(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A block in which autocast lowers no precision."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
