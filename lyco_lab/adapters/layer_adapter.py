"""One adapter on one layer: its factors, and what acts on them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lyco_lab.adapters.base import Adapter, Additive
from lyco_lab.adapters.options import SCALAR, Options
from lyco_lab.adapters.shapes import Factors
from lyco_lab.seeds import uniforms

BIAS = "bias"  # a factor that belongs to the mount, as SCALAR does, not to the adapter's rule
GATE = "gate"  # what `change` finds among the factors of an adapter that sees the timestep


class FactorDict(nn.ParameterDict):
    """The factors of one adapter on one layer; a type of its own, so that freezing passes it by."""


class Mount(nn.Module):
    """One adapter on one layer: its factors, and what acts on them."""

    def __init__(
        self,
        adapter: Adapter,
        factors: FactorDict,
        options: Options,
        *,
        key: int,
        clock: Tensor,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.factors = factors
        self.options = options
        self.strength = 1.0
        self.key = key  # of what is drawn for this layer
        # Forward passes so far, and which part of the step's samples is seen: one tensor for all
        # layers of an attachment.
        self.clock = clock
        self.dtype = dtype  # in which the rule is computed
        self.gates: Tensor | None = None  # a row per sample, for adapters that see the timestep
        # torch's TransformerEncoderLayer computes from the weights of the layers inside it, and
        # never calls them, unless something in it has a hook.
        self.register_forward_pre_hook(_no_hook)

    def rule_factors(self) -> Factors:
        """The adapter's own factors, as they train."""
        return {
            name: factor for name, factor in self.factors.items() if name != BIAS and name != SCALAR
        }

    def current(self, strength: Tensor | float | None = None) -> Factors:
        """The factors as the rule sees them now: with scalar, masks and strength in."""
        adapter, inner = self.adapter, self.adapter.inner
        strength = self.strength if strength is None else strength
        factors = self.rule_factors()
        for name, factor in factors.items():
            if factor.dtype != self.dtype:
                factors[name] = factor.to(self.dtype)
        if SCALAR in self.factors:
            _scale(factors, inner.scaling, self.factors[SCALAR].to(self.dtype))
        if self.training:
            for name, axis in inner.components.items():
                if name in factors:
                    factors[name] = self._masked(factors[name], axis)
            if self.options.module_dropout and is_linear(adapter):
                _scale(factors, adapter.scaling, self._module_mask())
        if not is_one(strength):
            _scale(factors, adapter.scaling, strength)
        if self.gates is not None:
            factors[GATE] = self.gates
        return factors

    def offset(self) -> Tensor | None:
        """What the bias gains."""
        if BIAS not in self.factors:
            return None
        offset = self.factors[BIAS].to(self.dtype)
        if self.training and self.options.module_dropout:
            offset = offset * self._module_mask()
        return offset if self.strength == 1.0 else self.strength * offset

    def is_plain(self) -> bool:
        """Whether the layer is the frozen one with W' for W, where `current` gives the factors."""
        options, active = self.options, self.training
        dropped = active and (
            options.dropout > 0 or (options.module_dropout > 0 and not is_linear(self.adapter))
        )
        scaled = self.strength != 1.0 and not self.adapter.scaling
        return not dropped and not scaled and self.gates is None

    def input(self, x: Tensor) -> Tensor:
        """What the change sees of the layer's input."""
        p = self.options.dropout
        if not (self.training and p):
            return x
        # Parts of one size draw for their samples what the whole would.
        kept = self._uniforms(1, x.numel(), self.clock[1] * x.numel()).view_as(x) >= p
        return torch.where(kept, x / (1 - p), 0.0)

    def scaled(self, change: Tensor) -> Tensor:
        """The change times what no factor carries."""
        if self.strength != 1.0 and not self.adapter.scaling:
            change = self.strength * change
        if self.training and self.options.module_dropout and not is_linear(self.adapter):
            change = change * self._module_mask().to(change.dtype)
        return change

    def _masked(self, factor: Tensor, axis: int) -> Tensor:
        size = factor.shape[axis]
        shape = [-1 if i == axis else 1 for i in range(factor.dim())]
        mask = self.adapter.inner.mask(lambda n: self._uniforms(3, n), size)
        if mask is not None:
            factor = factor * mask.view(shape)
        p = self.options.rank_dropout
        if p:
            kept = self._uniforms(2, size).view(shape) >= p
            factor = factor * (kept / (1 - p)).to(factor.dtype)
        return factor

    def _module_mask(self) -> Tensor:
        p = self.options.module_dropout
        return ((self._uniforms(0, 1) >= p) / (1 - p)).to(self.dtype).squeeze()

    def _uniforms(self, stream: int, size: int, first: Tensor | int = 0) -> Tensor:
        device = next(iter(self.factors.values())).device
        # Streams are far apart in the counters that are hashed.
        return uniforms(self.key + (stream << 48) + first, self.clock[0], size, device)


def _no_hook(module: nn.Module, args: Any) -> None:
    """Never called, as a mount is not: that there is a hook is what counts."""


def _scale(factors: Factors, names: Sequence[str], by: Tensor | float) -> None:
    for name in names:
        if name in factors:
            factors[name] = factors[name] * by


def is_one(strength: Tensor | float) -> bool:
    """Whether a strength does nothing. A tensor's is not read: its device would be waited for."""
    return not isinstance(strength, Tensor) and strength == 1.0


def is_linear(adapter: Adapter) -> bool:
    """Whether scaling the factors named in `scaling` scales the change alike."""
    return isinstance(adapter, Additive)
