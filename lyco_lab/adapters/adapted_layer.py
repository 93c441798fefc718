"""A layer that carries adapters, and what is to know of any layer that could."""

from typing import cast

import torch
from torch import Tensor, nn

from lyco_lab.adapters import geometry
from lyco_lab.adapters.layer_adapter import Mount
from lyco_lab.adapters.shapes import Shape

MATRICES = (nn.Linear, *geometry.CONVOLUTIONS, nn.Embedding)
NORMS = geometry.NORMS


class Adapted(nn.Module):
    """What a layer with adapters is besides the layer that it was."""

    mounts: nn.ModuleList
    opaque: bool = False  # it can be called, but its weight not read

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
        return reference_tensor(self).dtype

    @property
    def device(self) -> torch.device:
        return reference_tensor(self).device


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


def reference_tensor(layer: nn.Module) -> Tensor:
    """A tensor of the layer that says in what precision it computes."""
    weight = layer._parameters.get(weight_name(layer))
    if weight is not None and weight.is_floating_point():
        return weight
    for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(0)
