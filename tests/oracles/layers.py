"""Layers of every kind that another library adapts too, with inputs for them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            layer = make()
            for parameter in layer.parameters():  # weights of norm layers start as ones
                nn.init.normal_(parameter, std=0.5)
        return layer

    return build


# All with 8 inputs and 12 outputs: neither side can be taken for the other.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    name: seeded(make)
    for name, make in {
        "linear": lambda: nn.Linear(8, 12),
        "conv": lambda: nn.Conv2d(8, 12, 3, padding=1),
        "point": lambda: nn.Conv2d(8, 12, 1),
        "strided": lambda: nn.Conv2d(8, 12, 3, stride=2, bias=False),
        "conv1d": lambda: nn.Conv1d(8, 12, 3),
        "conv3d": lambda: nn.Conv3d(8, 12, 3),
        "embedding": lambda: nn.Embedding(9, 6),
        "layer norm": lambda: nn.LayerNorm(8),
        "group norm": lambda: nn.GroupNorm(2, 8),
    }.items()
}
_rng = torch.Generator().manual_seed(6)
INPUTS: dict[str, Tensor] = {
    "linear": torch.randn(3, 5, 8, generator=_rng),
    "conv": torch.randn(2, 8, 5, 6, generator=_rng),
    "point": torch.randn(2, 8, 5, 6, generator=_rng),
    "strided": torch.randn(2, 8, 5, 6, generator=_rng),
    "conv1d": torch.randn(2, 8, 9, generator=_rng),
    "conv3d": torch.randn(1, 8, 4, 3, 4, generator=_rng),
    "embedding": torch.randint(9, (2, 7), generator=_rng),
    "layer norm": torch.randn(3, 5, 8, generator=_rng),
    "group norm": torch.randn(2, 8, 5, 6, generator=_rng),
}


def relative(given: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of what is expected."""
    return ((given - expected).norm() / expected.norm()).item()
