"""A layer that carries adapters: the frozen layer it was, and one `Mount` for each.

The layer keeps its name, its parameters and its type in the sense of `isinstance`; only its class
is exchanged for a subclass whose forward goes through plan.py, and back when the last adapter
comes off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lyco_lab import waits
from lyco_lab.adapters import attention, forward, geometry, plan
from lyco_lab.adapters.base import Adapter, Additive, Factors, Shape
from lyco_lab.adapters.options import SCALAR, Options
from lyco_lab.seeds import uniforms

MATRICES = (nn.Linear, *geometry.CONVOLUTIONS, nn.Embedding)
NORMS = geometry.NORMS
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
            if self.options.module_dropout and _linear(adapter):
                _scale(factors, adapter.scaling, self._module_mask())
        if not _is_one(strength):
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
            options.dropout > 0 or (options.module_dropout > 0 and not _linear(self.adapter))
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
        if self.training and self.options.module_dropout and not _linear(self.adapter):
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


def _is_one(strength: Tensor | float) -> bool:
    """Whether a strength does nothing. A tensor's is not read: its device would be waited for."""
    return not isinstance(strength, Tensor) and strength == 1.0


def _linear(adapter: Adapter) -> bool:
    """Whether scaling the factors named in `scaling` scales the change alike."""
    return isinstance(adapter, Additive)


class Adapted(nn.Module):
    """What a layer with adapters is besides the layer that it was."""

    mounts: nn.ModuleList
    opaque: bool = False  # it can be called, but its weight not read

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return forward.apply(self, *args, **kwargs)

    def active(self) -> list[Mount]:
        """The adapters that change anything now."""
        mounts = [cast(Mount, mount) for mount in self.mounts]
        return [mount for mount in mounts if mount.strength != 0.0]

    def base_forward(self, x: Tensor) -> Tensor:
        """The frozen layer."""
        y: Tensor = super().forward(x)  # type: ignore[misc]
        return y

    def bias_with(self, mount: Mount) -> Tensor | None:
        """The bias with what an adapter adds to it."""
        bias, offset = self.frozen_bias, mount.offset()
        return bias if bias is None or offset is None else bias + offset

    @property
    def frozen_weight(self) -> Tensor:
        return cast(Tensor, self._parameters[weight_name(self)])

    @property
    def frozen_bias(self) -> Tensor | None:
        return self._parameters.get(bias_name(self))

    @property
    def weight_shape(self) -> Shape:
        return shape_of(self)

    @property
    def dtype(self) -> torch.dtype:
        return _reference_tensor(self).dtype

    @property
    def device(self) -> torch.device:
        return _reference_tensor(self).device


class AdaptedAttention(Adapted):
    """torch's attention while it or its output projection carries adapters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return attention.apply(self, *args, **kwargs)

    def base_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.frozen_weight, self.frozen_bias)


class Opaque(Adapted):
    """A layer of another library, or with a quantised weight: x -> W x + b is all that is known."""

    opaque = True

    def base_forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.Module.__getattribute__(self, "kind").forward(self, x)
        return y

    @property
    def frozen_bias(self) -> Tensor | None:
        bias = getattr(self, "bias", None)
        return bias if isinstance(bias, Tensor) else None


def weight_name(layer: nn.Module) -> str:
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def bias_name(layer: nn.Module) -> str:
    return "in_proj_bias" if isinstance(layer, nn.MultiheadAttention) else "bias"


def is_opaque(layer: nn.Module) -> bool:
    """Linear by its sizes, but not torch's own: only to be called."""
    if isinstance(layer, Adapted):
        return layer.opaque
    if isinstance(layer, nn.MultiheadAttention):
        return False
    for kind in (*MATRICES, *NORMS):
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            weight = layer._parameters.get("weight")
            return weight is not None and not isinstance(weight.data, Tensor)
    return True


def is_shared_out(layer: nn.Module) -> bool:
    """Whether each of several processes now holds a part of the weight only."""
    return hasattr(layer._parameters.get(weight_name(layer)), "full_tensor")  # torch's DTensor


def gathered(weight: Tensor) -> Tensor:
    """The whole weight; if that is shared out, all processes have to ask for it at once."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def shape_of(layer: nn.Module) -> Shape:
    """Of the weight to be adapted: (out, in) where the layer only tells its sizes."""
    weight = layer._parameters.get(weight_name(layer))
    if weight is not None and not is_opaque(layer):
        return tuple(weight.shape)
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def _reference_tensor(layer: nn.Module) -> Tensor:
    """A tensor of the layer that says in what precision it computes."""
    weight = layer._parameters.get(weight_name(layer))
    if weight is not None and weight.is_floating_point():
        return weight
    for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(0)


_TYPES: dict[type[nn.Module], type[Adapted]] = {}  # Linear -> AdaptedLinear, made once


def adapted_type(layer: nn.Module) -> type[Adapted]:
    kind = type(layer)
    if kind not in _TYPES:
        parent = Opaque if is_opaque(layer) else Adapted
        if isinstance(layer, nn.MultiheadAttention):
            parent = AdaptedAttention
        _TYPES[kind] = type(f"Adapted{kind.__name__}", (parent, kind), {"kind": kind})
    return _TYPES[kind]


def put_on(layer: nn.Module, mount: Mount) -> Adapted:
    """Add an adapter to a layer."""
    adapted = _wake(layer)
    adapted.mounts.append(mount)
    return adapted


def take_off(layer: nn.Module, mount: Mount) -> None:
    """Take an adapter off; the last one leaves the ordinary layer."""
    adapted = cast(Adapted, layer)
    adapted.mounts = nn.ModuleList(other for other in adapted.mounts if other is not mount)
    if not adapted.mounts:
        _rest(layer)


def settle(model: nn.Module, name: str) -> None:
    """Have attention computed by its adapters, or as ever, after `name` in it was changed.

    torch's attention never calls its output projection, so that is adapted only if the attention
    is, with or without adapters of its own.
    """
    owner = model.get_submodule(name.rpartition(".")[0] if name.endswith("out_proj") else name)
    if not isinstance(owner, nn.MultiheadAttention):
        return
    if isinstance(owner.out_proj, Adapted):
        _wake(owner)
    elif isinstance(owner, Adapted) and not owner.mounts:
        _rest(owner)


def _wake(layer: nn.Module) -> Adapted:
    if not isinstance(layer, Adapted):
        layer.__class__ = adapted_type(layer)
        layer.mounts = nn.ModuleList()  # type: ignore[assignment]
    return cast(Adapted, layer)


def _rest(layer: nn.Module) -> None:
    del layer.mounts
    layer.__class__ = cast(Any, type(layer)).kind


@dataclass
class Original:
    """The frozen parameters of a layer into which adapters were merged."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    merged: list[Mount] = field(default_factory=list)


# By layer, not by attachment: several may be merged into one layer, and unmerged in any order.
_ORIGINALS: WeakKeyDictionary[nn.Module, Original] = WeakKeyDictionary()


def original(layer: nn.Module) -> Original:
    """The frozen parameters, merged or not."""
    if layer in _ORIGINALS:
        return _ORIGINALS[layer]
    parameters = layer._parameters
    weight = cast(nn.Parameter, parameters.get(weight_name(layer)))  # none, if it can't be read
    return Original(weight, cast(Any, parameters.get(bias_name(layer))))


@torch.no_grad()
def merge(layer: nn.Module, mount: Mount) -> None:
    """Raises `Overflow`, and changes nothing, where the sum has no number in the layer's dtype."""
    kept = _ORIGINALS.get(layer) or original(layer)
    _set_merged(layer, replace(kept, merged=[*kept.merged, mount]))
    kept.merged.append(mount)
    _ORIGINALS[layer] = kept


@torch.no_grad()
def unmerge(layer: nn.Module, mount: Mount) -> None:
    """Raises `Overflow`, and changes nothing, where what is left has no number in that dtype."""
    kept = _ORIGINALS[layer]
    left = [other for other in kept.merged if other is not mount]
    device = cast(Tensor, layer._parameters[weight_name(layer)]).device
    kept.weight.data = kept.weight.data.to(device)  # the model may have moved meanwhile
    if kept.bias is not None:
        kept.bias.data = kept.bias.data.to(device)
    mount.to(device)
    if left:
        _set_merged(layer, replace(kept, merged=left))
    kept.merged = left
    if left:
        return
    del _ORIGINALS[layer]
    layer._parameters[weight_name(layer)] = kept.weight
    if kept.bias is not None:
        layer._parameters[bias_name(layer)] = kept.bias


def _set_merged(layer: nn.Module, kept: Original) -> None:
    """W + the sum of what is merged, rounded once."""
    weight, bias = kept.weight, kept.bias
    if len(kept.merged) == 1:
        total = adapted_weight(kept.merged[0], weight)
    else:
        total = weight.to(plan.factor_dtype(weight.dtype))
        for mount in kept.merged:
            total = total + weight_delta(mount, weight)
    # Another parameter, not another value: a layer that shares the old one is no target.
    fresh = {weight_name(layer): rounded(total, weight.dtype) if total is not weight else
             weight.clone()}  # fmt: skip
    offsets = [offset for mount in kept.merged if (offset := mount.offset()) is not None]
    if offsets and bias is not None:
        moved = bias.to(plan.factor_dtype(bias.dtype))
        for offset in offsets:
            moved = moved + offset
        fresh[bias_name(layer)] = rounded(moved, bias.dtype)
    for name, value in fresh.items():
        layer._parameters[name] = nn.Parameter(value, requires_grad=False)


def restorer(layer: nn.Module) -> Callable[[], None]:
    """What gives the layer back the parameters that it has now, and what is merged into it."""
    names = [name for name in (weight_name(layer), bias_name(layer)) if name in layer._parameters]
    now = {name: layer._parameters[name] for name in names}
    kept = _ORIGINALS.get(layer)
    merged = [] if kept is None else list(kept.merged)

    def restore() -> None:
        layer._parameters.update(now)
        if kept is None:
            _ORIGINALS.pop(layer, None)
        else:
            kept.merged = merged
            _ORIGINALS[layer] = kept

    return restore


class Overflow(ValueError):
    """Numbers of which some have no place in a dtype; the message says the largest."""


def rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """`total` in `dtype`. Raises `Overflow` where that is not finite."""
    result = total.to(dtype)
    if not waits.host(torch.isfinite(result).all(), "merged"):
        largest, most = float(total.abs().max()), torch.finfo(dtype).max
        raise Overflow(f"would hold {largest:.4g}, and {dtype} holds at most {most:.4g}")
    return result


@torch.no_grad()
def check_merge(layer: nn.Module, mount: Mount) -> None:
    """Raise `Overflow` where `merge_in_place` would make numbers that are not finite."""
    weight, bias, offset = original(layer).weight, original(layer).bias, mount.offset()
    rounded(adapted_weight(mount, weight), weight.dtype)
    if offset is not None and bias is not None:
        rounded(bias.to(mount.dtype) + offset, bias.dtype)


@torch.no_grad()
def merge_in_place(layer: nn.Module, mount: Mount) -> None:
    """Fold the adapter into the very tensors of the layer."""
    weight, bias = original(layer).weight, original(layer).bias
    kernel = mount.adapter.kernel(tuple(weight.shape))
    plain = weight.dtype == mount.dtype and (mount.strength == 1.0 or mount.adapter.scaling)
    plain = plain and weight.is_contiguous()  # or its unrolling would be a copy
    if isinstance(kernel, plan.AdditiveKernel) and plain:
        with plan.exact(weight):
            kernel.form(weight.data, _evaluated(mount), out=weight.data)
    else:
        weight.data.copy_(adapted_weight(mount, weight))
    offset = mount.offset()
    if offset is not None and bias is not None:
        bias.data.copy_(bias.to(mount.dtype) + offset)


def _evaluated(mount: Mount, strength: Tensor | float | None = None) -> Factors:
    """The factors without what is dropped in training."""
    training = mount.training
    mount.training = False
    try:
        return mount.current(strength)
    finally:
        mount.training = training


def adapted_weight(mount: Mount, weight: Tensor) -> Tensor:
    """W + strength * (W' - W), at least in float32; W itself at strength 0."""
    if mount.strength == 0.0:
        return weight
    if mount.strength != 1.0 and not mount.adapter.scaling:
        return weight.to(mount.dtype) + weight_delta(mount, weight)
    with plan.exact(weight):
        return mount.adapter.adapted(weight.to(mount.dtype), _evaluated(mount))


def weight_delta(mount: Mount, weight: Tensor, strength: Tensor | float | None = None) -> Tensor:
    """strength * (W' - W), at least in float32."""
    strength = mount.strength if strength is None else strength
    with plan.exact(weight):
        delta = mount.adapter.delta(weight.to(mount.dtype), _evaluated(mount, strength))
    if not _is_one(strength) and not mount.adapter.scaling:
        delta = strength * delta
    return delta
