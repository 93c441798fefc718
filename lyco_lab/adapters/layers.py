"""Putting adapters on a layer and taking them off.

The layer keeps its name, its parameters and its type in the sense of `isinstance`; only its class
is exchanged for a subclass whose forward goes through plan.py, and back when the last adapter
comes off.
"""

from typing import Any, cast

from torch import Tensor, nn

from lyco_lab.adapters import attention, forward
from lyco_lab.adapters.adapted_layer import Adapted, is_opaque
from lyco_lab.adapters.layer_adapter import Mount


class Computed(Adapted):
    """What an ordinary layer becomes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return forward.apply(self, *args, **kwargs)


class AdaptedAttention(Computed):
    """torch's attention while it or its output projection carries adapters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return attention.apply(self, *args, **kwargs)

    def base_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.frozen_weight, self.frozen_bias)


class Opaque(Computed):
    """A layer of another library, or with a quantised weight: x -> W x + b is all that is known."""

    opaque = True

    def base_forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.Module.__getattribute__(self, "kind").forward(self, x)
        return y

    @property
    def frozen_bias(self) -> Tensor | None:
        bias = getattr(self, "bias", None)
        return bias if isinstance(bias, Tensor) else None


_TYPES: dict[type[nn.Module], type[Adapted]] = {}  # Linear -> AdaptedLinear, made once


def adapted_type(layer: nn.Module) -> type[Adapted]:
    kind = type(layer)
    if kind not in _TYPES:
        parent: type[Computed] = Opaque if is_opaque(layer) else Computed
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
