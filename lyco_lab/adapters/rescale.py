"""Kernels of rules that scale the rows or the columns of a weight.

    rows      y = s * (V x) + b          gs = sum gy * (V x)        over positions, per output
    columns   y = V (s * x) + b          gs = sum x * (V^T gy)      over positions, per input

V x is not kept beside the output: it is (y - b) / s. Where an |s| is so small that the division
would lose digits, V x is kept instead, on any machine that can look without waiting for it.

With s = m / n and n the norms of V's rows or columns, V = W + gamma T of another kernel, n changes
with T as well:

    gm = gs / n           gV = s G + c V          c = -gs m / n**3,  or 0 where n is held constant

so that of a gradient by tokens only c V is left to be formed, and G never.

Shapes: P outputs, Q inputs, R the rank of T where it has one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lyco_lab.adapters.kernel import (
    FORM_DENSE,
    FORM_TOKENS,
    SIDE_TOKENS,
    Kernel,
    Plan,
    Saved,
    Sizes,
)
from lyco_lab.adapters.lowrank import LowRank
from lyco_lab.adapters.plan import PASS, AdditiveKernel, TokenKernel, skinny
from lyco_lab.adapters.shapes import Factors, Shape

# In multiply-adds of a large product: reading an entry of a weight, or writing it in its place.
TOUCH = 10.0
# |s| from which (y - b) / s is V x to within a few roundings.
SMALLEST = 1 / 16


def can_look(x: Tensor) -> bool:
    """Whether a value may decide what to do next without stopping a device or a trace."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def can_undo(s: Tensor) -> bool:
    """Whether what was multiplied by `s` can be had from the product."""
    return can_look(s) and bool((s.detach().abs() >= SMALLEST).all())


def scaled_rows(
    op: Any, x: Tensor, weight: Tensor, s_P: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """s * (W x) + b, and what is to be kept: the output, or W x where that cannot be undone."""
    if can_undo(s_P):
        y = rescale_(op, op.product(x, weight, bias), s_P, bias)
        return y, y
    z = op.product(x, weight)
    y = z * op.channels(s_P)
    return (y if bias is None else y.add_(op.channels(bias))), z


def rescale_(op: Any, y: Tensor, s_P: Tensor, bias: Tensor | None) -> Tensor:
    """s * (y - b) + b in place; y itself, bit for bit, where s is 1."""
    y = y.mul_(op.channels(s_P))
    return y if bias is None else y.add_(op.channels((1 - s_P) * bias))


def row_grads(op: Any, gy: Tensor, kept: Tensor, s_P: Tensor, bias: Tensor | None) -> Tensor:
    """gs of what `scaled_rows` kept."""
    if can_undo(s_P):
        gs: Tensor = op.dots(gy, kept, bias) / s_P
        return gs
    gs = op.dots(gy, kept, None)
    return gs


def norms(weight: Tensor, columns: bool) -> Tensor:
    """The length of each row, or of each column with all its taps."""
    if not columns:
        lengths: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
        return lengths
    squares = sums(weight.square(), columns)
    empty = squares == 0  # where the root has no derivative
    return torch.where(empty, 1.0, squares).sqrt() * ~empty


# By frozen weight: where it lay, its version, and the lengths of its rows. Reading all of a weight
# costs as much as a product with a few dozen tokens.
_LENGTHS: Any = WeakTensorKeyDictionary()


def frozen_norms(weight: Tensor) -> Tensor:
    """`norms` of a weight's rows, kept until it is written to or moved."""
    if torch.compiler.is_compiling():
        return norms(weight, False)
    stamp = (weight.data_ptr(), weight._version)
    if weight not in _LENGTHS or _LENGTHS[weight][0] != stamp:
        _LENGTHS[weight] = (stamp, norms(weight, False))
    lengths: Tensor = _LENGTHS[weight][1]
    return lengths


def sums(entries: Tensor, columns: bool) -> Tensor:
    """Over each row, or over each column with all its taps."""
    if not columns:
        return entries.flatten(1).sum(1)
    return entries.sum(0).view(entries.shape[1], -1).sum(1)


def along(weight_shape: Shape, columns: bool) -> Shape:
    """The shape in which a number per row, or per column, multiplies the weight."""
    taps = [1] * (len(weight_shape) - 2)
    return (1, weight_shape[1], *taps) if columns else (weight_shape[0], 1, *taps)


@dataclass(frozen=True)
class Times:
    """Each channel times its number; the inputs of a group, times those of its columns."""

    by: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        by = self.by.to(v.dtype)
        return v * by.repeat(v.shape[-1] // by.numel())


@dataclass(frozen=True)
class Normalised(Kernel):
    """m * V / norms(V), where `kernel` makes V = W + gamma T of the factors other than m."""

    shape: Shape
    kernel: AdditiveKernel
    magnitude: str  # the factor m
    columns: bool
    detached: bool  # the norms are constants in the gradient

    @property
    def traceable(self) -> bool:  # type: ignore[override]
        return self.kernel.traceable

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        inner = self.kernel.costs(sizes)
        rank = self.kernel.rank if isinstance(self.kernel, LowRank) else 0
        turned = 0.0 if self.detached else sizes.N * (2 * rank * skinny(rank) + TOUCH)
        outputs = sizes.T * sizes.P * 2 * TOUCH
        costs = {}
        if FORM_DENSE in inner:
            costs[FORM_DENSE] = inner[FORM_DENSE] + sizes.N * (2 * TOUCH + 2 * PASS)
        if FORM_TOKENS in inner:
            costs[FORM_TOKENS] = inner[FORM_TOKENS] + sizes.N * 3 * TOUCH + turned + outputs
        if SIDE_TOKENS in inner and isinstance(self.kernel, LowRank) and not self.columns:
            ridden = sizes.N * (TOUCH + (1 if self.detached else 2) * rank * skinny(rank))
            costs[SIDE_TOKENS] = inner[SIDE_TOKENS] + ridden + 2 * outputs
        return costs

    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        m, inner = self._split(factors)
        if plan.apply == "side":
            return self._beside(op, x, weight, bias, m, inner)
        formed = self.kernel.form(weight, inner)
        n = norms(formed, self.columns)
        s = ratio(m, n)
        if plan.grads == "tokens" and not self.columns and not can_undo(s):
            y, kept = scaled_rows(op, x, formed, s, bias)
            return y, (n, kept)
        y = op.product(x, self._times_(formed, s), bias)
        return y, (n, y) if plan.grads == "tokens" and not self.columns else (n,)

    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        m, inner = self._split(saved.factors)
        n, s = saved.kept[0], ratio(m, saved.kept[0])
        if plan.grads == "dense":
            gx, grads, gs = self._dense_grads(op, gy, saved, inner, n, s, need_gx)
        elif self.columns:
            gx, grads, gs = self._column_grads(op, gy, saved, inner, n, s, need_gx)
        elif plan.apply == "form":
            gx, grads, gs = self._formed_grads(op, gy, saved, inner, n, s, need_gx)
        else:
            gx, grads, gs = self._beside_grads(op, gy, saved, inner, n, s, need_gx)
        gm = (gs / nonzero(n)).masked_fill(n == 0, 0.0)
        return gx, {**grads, self.magnitude: gm.view_as(saved.factors[self.magnitude])}

    def _split(self, factors: Factors) -> tuple[Tensor, Factors]:
        inner = {name: factor for name, factor in factors.items() if name != self.magnitude}
        return factors[self.magnitude].flatten(), inner

    def _times_(self, weight: Tensor, s: Tensor) -> Tensor:
        return weight.mul_(s.view(along(self.shape, self.columns)))

    def _turn(self, gs: Tensor, s: Tensor, n: Tensor) -> Tensor:
        """c, with gV = s G + c V."""
        return (gs * s / nonzero(n).square()).neg_().masked_fill_(n == 0, 0.0)

    def _dense_grads(
        self, op: Any, gy: Tensor, saved: Saved, inner: Factors, n: Tensor, s: Tensor, need_gx: bool
    ) -> tuple[Tensor | None, Factors, Tensor]:
        formed = self.kernel.form(saved.weight, inner)
        wide = along(self.shape, self.columns)
        if need_gx:
            gx, gw = op.grads(gy, saved.input(), formed * s.view(wide))
        else:
            gx, gw = None, op.grad_weight(gy, saved.input(), saved.weight)
        gs = sums(gw * formed, self.columns)
        gw = self._times_(gw, s)
        if not self.detached:
            gw = gw.addcmul_(formed, self._turn(gs, s, n).view(wide))
        return gx, self.kernel.dense_grads(gw, inner), gs

    def _formed_grads(
        self, op: Any, gy: Tensor, saved: Saved, inner: Factors, n: Tensor, s: Tensor, need_gx: bool
    ) -> tuple[Tensor | None, Factors, Tensor]:
        gs = row_grads(op, gy, saved.kept[1], s, saved.bias)
        grads = self._token_grads(op, gy, saved.input(), inner, s)
        gx = None
        if need_gx or not self.detached:
            formed, turn = self.kernel.form(saved.weight, inner), self._turn(gs, s, n)
            if need_gx and self.detached:
                gx = op.grad_input(gy, saved.x_shape, self._times_(formed, s))
            elif need_gx and can_undo(s):
                gx = op.grad_input(gy, saved.x_shape, self._times_(formed, s))
                turn = turn / s
            elif need_gx:
                wide = along(self.shape, self.columns)
                gx = op.grad_input(gy, saved.x_shape, formed * s.view(wide))
            if not self.detached:
                grads = _sum(grads, self.kernel.dense_grads(self._times_(formed, turn), inner))
        return gx, grads, gs

    def _token_grads(self, op: Any, gy: Tensor, x: Tensor, inner: Factors, s_P: Tensor) -> Factors:
        """The part through s G; of a low rank without a scaled copy of gy."""
        kernel = self.kernel
        if not isinstance(kernel, LowRank):
            assert isinstance(kernel, TokenKernel)
            return kernel.token_grads(op, gy * op.channels(s_P), x, inner, None)
        b_PR, a_RQ = kernel.pair(inner)
        gh = op.down(gy, b_PR * s_P[:, None]).mul_(kernel.gamma)
        gb_PR = op.outer(gy, op.narrow(x, a_RQ)) * (kernel.gamma * s_P[:, None])
        return kernel.pair_grads(inner, gb_PR, op.grad_weight(gh, x, a_RQ))

    def _column_grads(
        self, op: Any, gy: Tensor, saved: Saved, inner: Factors, n: Tensor, s: Tensor, need_gx: bool
    ) -> tuple[Tensor | None, Factors, Tensor]:
        x, over = saved.input(), op.channels(s)
        formed = self.kernel.form(saved.weight, inner)
        gu = op.grad_input(gy, saved.x_shape, formed)  # of u = s * x
        gs = op.dots(x, gu, None)
        assert isinstance(self.kernel, TokenKernel)
        grads = self.kernel.token_grads(op, gy, x * over, inner, None)
        if not self.detached:
            turned = self._times_(formed, self._turn(gs, s, n))
            grads = _sum(grads, self.kernel.dense_grads(turned, inner))
        return (gu.mul_(over) if need_gx else None), grads, gs

    def _beside(
        self, op: Any, x: Tensor, weight: Tensor, bias: Tensor | None, m: Tensor, inner: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        kernel = self.kernel
        assert isinstance(kernel, LowRank)
        b_PR, a_RQ = kernel.pair(inner)
        y = op.product(x, weight, bias)
        # |W + gamma B A|**2 - |W|**2 by rows, of products with A alone.
        flat_RQ, gamma = a_RQ.flatten(1), kernel.gamma
        va_PR = (flat_RQ @ weight.flatten(1).t()).t()
        baa_PR = b_PR @ (flat_RQ @ flat_RQ.t())
        more = gamma * ((2 * va_PR + gamma * baa_PR) * b_PR).sum(1)
        n_W = frozen_norms(weight)
        root = (n_W * n_W + more).clamp_min(0).sqrt()
        if can_look(x) and bool((root >= n_W / 2).all()):
            n = n_W + more / nonzero(root + n_W)  # n_W itself where B is 0
        else:  # what is left of a row would have lost its digits
            n = norms(kernel.form(weight, inner), False)
        va_PR = va_PR.add_(baa_PR, alpha=gamma)
        s = ratio(m, n)
        y = op.widen_(y, op.narrow(x, a_RQ), b_PR, gamma)
        kept = (n, va_PR) if not self.detached else (n,)
        if can_undo(s):
            y = rescale_(op, y, s, bias)
            return y, (*kept, y)
        z = y if bias is None else y.sub_(op.channels(bias))
        y = z * op.channels(s)
        return (y if bias is None else y.add_(op.channels(bias))), (*kept, z)

    def _beside_grads(
        self, op: Any, gy: Tensor, saved: Saved, inner: Factors, n: Tensor, s: Tensor, need_gx: bool
    ) -> tuple[Tensor | None, Factors, Tensor]:
        kernel, x, weight = self.kernel, saved.input(), saved.weight
        assert isinstance(kernel, LowRank)
        gs = row_grads(op, gy, saved.kept[-1], s, saved.bias)
        b_PR, a_RQ = kernel.pair(inner)
        gamma = kernel.gamma
        gh = op.down(gy, b_PR * s[:, None]).mul_(gamma)
        ga_RQ = op.grad_weight(gh, x, a_RQ)
        gb_PR = op.outer(gy, op.narrow(x, a_RQ)) * (gamma * s[:, None])
        gx, cbw_RQ = None, None
        if not self.detached:
            turn = self._turn(gs, s, n)[:, None]
            cb_RP = (turn * b_PR).t().contiguous()
            gb_PR = gb_PR.addcmul_(turn, saved.kept[1], value=gamma)
            if need_gx:
                gx, cbw_RQ = op.ride(gy * op.channels(s), saved.x_shape, cb_RP, weight)
            else:
                cbw_RQ = cb_RP @ weight.flatten(1)
            cbv_RQ = cbw_RQ.add(cb_RP @ b_PR @ a_RQ.flatten(1), alpha=gamma)
            ga_RQ = ga_RQ.add(cbv_RQ.view_as(ga_RQ), alpha=gamma)
        elif need_gx:
            gx = op.grad_input(gy * op.channels(s), saved.x_shape, weight)
        if gx is not None:
            gx = op.side_(gx, gh, a_RQ)
        return gx, kernel.pair_grads(inner, gb_PR, ga_RQ), gs


def nonzero(n: Tensor) -> Tensor:
    # Not `where` with a number, which would make a tensor of it at every call.
    return n.masked_fill(n == 0, 1.0)


def ratio(m: Tensor, n: Tensor) -> Tensor:
    """m / n; 1 where V is 0, so that what comes to a row of zeros can still grow."""
    return (m / nonzero(n)).masked_fill(n == 0, 1.0)


def _sum(one: Factors, other: Factors) -> Factors:
    return {name: grad + other[name] for name, grad in one.items()}
