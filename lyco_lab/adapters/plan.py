"""How an adapted layer is computed.

Every plan is exact: it gives the layer's output with the weight W' and the gradients of the
factors, and differs from the others only in what it costs. There is one, the reference: form W',
then compute the layer with it. Cheaper contractions of the same expression are chosen in `apply`,
from the layer and the call's sizes, and are tested against the reference, values and gradients.

In half precision W + delta would round a small delta away, so the reference computes the layer
twice there, with W and with delta, and adds the outputs. Factors and delta stay in float32.
"""

import contextlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyco_lab.adapters.base import Adapter, Factors

if TYPE_CHECKING:
    from lyco_lab.adapters.mount import Adapted

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
HALF = (torch.bfloat16, torch.float16)


def apply(layer: "Adapted", x: Tensor) -> Tensor:
    """The layer's output with its adapted weight."""
    if layer.strength == 0.0:
        return product(layer, x, layer.weight, layer.bias)
    return reference(layer, x)


def reference(layer: "Adapted", x: Tensor) -> Tensor:
    factors = dict(layer.factors.items())
    dtype = computing_dtype(layer.weight)
    if dtype not in HALF:
        weight = adapted_weight(layer.adapter, layer.weight, factors, layer.strength)
        return product(layer, x, weight, layer.bias)
    base = product(layer, x, layer.weight, layer.bias)
    with exact(x):
        delta = weight_delta(layer.adapter, layer.weight, factors, layer.strength)
        # bfloat16 has the range of float32; float16 has not, and would lose small entries.
        side = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return base + product(layer, x.to(side), delta.to(side), None).to(base.dtype)


def adapted_weight(adapter: Adapter, weight: Tensor, factors: Factors, strength: float) -> Tensor:
    """W + strength * (W' - W), at least in float32; W itself at strength 0."""
    if strength == 0.0:
        return weight
    with exact(weight):
        weight = weight.to(factor_dtype(weight))
        if strength == 1.0:
            return adapter.adapted(weight, factors)
        return weight + strength * adapter.delta(weight, factors)


def weight_delta(adapter: Adapter, weight: Tensor, factors: Factors, strength: float) -> Tensor:
    """strength * (W' - W), at least in float32."""
    with exact(weight):
        delta = adapter.delta(weight.to(factor_dtype(weight)), factors)
        return delta if strength == 1.0 else strength * delta


def product(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` computes, with another weight."""
    if isinstance(layer, CONVOLUTIONS):
        return layer._conv_forward(x, weight, bias)  # knows its stride, groups and padding mode
    return F.linear(x, weight, bias)


def factor_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def computing_dtype(weight: Tensor) -> torch.dtype:
    """The precision that the layer's product will run in."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def exact(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A block in which autocast lowers no precision."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
