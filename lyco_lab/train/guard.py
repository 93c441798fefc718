"""Where a number that is not finite comes from.

A loss of NaN or infinity taints every gradient, so gradients say nothing of its cause. The culprit
is a factor that is not finite, or else the first layer, in the order of computation, whose output
is not. Where only gradients overflow, the first of those is named.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lyco_lab.errors import UserError

FILE = "not-finite.ckpt"  # beside the checkpoints, not among them: no run goes on from it


class NotFinite(UserError):
    """A loss or gradient that is not finite; training stopped before using it."""


def finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def first_factor(factors: Mapping[str, nn.Parameter]) -> str | None:
    """'layer.factor' of the first factor that is not finite."""
    return next((name for name, factor in factors.items() if not finite(factor.detach())), None)


def first_gradient(factors: Mapping[str, nn.Parameter]) -> str | None:
    return next((n for n, f in factors.items() if f.grad is not None and not finite(f.grad)), None)


@torch.no_grad()
def first_output(layers: Mapping[str, nn.Module], compute: Callable[[], object]) -> str | None:
    """The layer that first gives an output that is not finite while `compute` runs."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not finite(output):
                found.append(name)

        return hook

    handles = [layer.register_forward_hook(look(name)) for name, layer in layers.items()]
    try:
        compute()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
