"""Folding adapters into the weights of a layer, and taking them out again bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lyco_lab import waits
from lyco_lab.adapters import plan
from lyco_lab.adapters.adapted_layer import bias_name, weight_name
from lyco_lab.adapters.layer_adapter import Mount, is_one
from lyco_lab.adapters.shapes import Factors


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
            kernel.form(weight.data, evaluated(mount), out=weight.data)
    else:
        weight.data.copy_(adapted_weight(mount, weight))
    offset = mount.offset()
    if offset is not None and bias is not None:
        bias.data.copy_(bias.to(mount.dtype) + offset)


def evaluated(mount: Mount, strength: Tensor | float | None = None) -> Factors:
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
        return mount.adapter.adapted(weight.to(mount.dtype), evaluated(mount))


def weight_delta(mount: Mount, weight: Tensor, strength: Tensor | float | None = None) -> Tensor:
    """strength * (W' - W), at least in float32."""
    strength = mount.strength if strength is None else strength
    with plan.exact(weight):
        delta = mount.adapter.delta(weight.to(mount.dtype), evaluated(mount, strength))
    if not is_one(strength) and not mount.adapter.scaling:
        delta = strength * delta
    return delta
