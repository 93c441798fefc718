"""Groups: multiples of a run's settings for some of its factors.

    groups:
      - {factors: ["b_*"], lr: 16}                       # LoRA+: B learns 16 times as fast as A
      - {layers: ["text_encoder.*"], lr: 0.5}            # and the text encoder half as fast
      - {layers: ["unet.mid_block.*"], init_scale: 2, lr: 2, optimizer: {eps: 0.5}}

A layer is called part.name, with the part `unet` or `text_encoder`. Of the groups that match a
factor the last one holds, alone. Everything is a multiple, so that a power of two changes no digit.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated

from lyco_lab.errors import UserError, nearest
from lyco_lab.settings import POSITIVE


@dataclass(frozen=True, kw_only=True)
class Group:
    """What is different for the factors whose layer and name match."""

    layers: tuple[str, ...] = ("*",)  # patterns of part.layer
    factors: tuple[str, ...] = ("*",)  # patterns of the factors' names
    init_scale: Annotated[float, POSITIVE] = 1.0  # times train.init_scale
    lr: Annotated[float, POSITIVE] = 1.0  # times train.lr, or train.text_encoder_lr
    # Weighs its gradients in the norm that train.grad_clip limits
    clip: Annotated[float, POSITIVE] = 1.0
    optimizer: Annotated[dict[str, float], POSITIVE] = field(
        default_factory=dict
    )  # setting -> times what it is

    def __post_init__(self) -> None:
        for name in ("init_scale", "lr", "clip"):
            _positive(name, getattr(self, name))
        for name, value in self.optimizer.items():
            _positive(f"optimizer.{name}", value)
        if not (self.layers and self.factors):
            raise UserError("a group needs patterns for its layers and factors, or neither key")

    def matches(self, layer: str, factor: str) -> bool:
        return any(fnmatchcase(layer, pattern) for pattern in self.layers) and any(
            fnmatchcase(factor, pattern) for pattern in self.factors
        )


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} of a group is {value!r}, needs a finite number > 0")


PLAIN = Group()


def group_of(groups: Sequence[Group], layer: str, factor: str) -> Group:
    """The group that holds for a factor; `PLAIN` where none matches."""
    return next((g for g in reversed(groups) if g.matches(layer, factor)), PLAIN)


def check(groups: Sequence[Group], factors: Iterable[tuple[str, str]]) -> None:
    """Raise an error for a group that decides nothing about these (layer, factor)."""
    factors = list(factors)
    held = {id(group_of(groups, layer, factor)) for layer, factor in factors}
    for number, group in enumerate(groups, start=1):
        if id(group) in held:
            continue
        where = f"group {number} of train.groups (layers {', '.join(group.layers)}; factors "
        where += f"{', '.join(group.factors)})"
        if any(group.matches(layer, factor) for layer, factor in factors):
            raise UserError(f"{where} decides nothing: later groups match all of its factors")
        names = sorted({factor for _, factor in factors})
        hint = nearest(group.layers[0], sorted({layer for layer, _ in factors}))
        raise UserError(f"{where} matches no factor: they are called {', '.join(names)}{hint}")
