"""What any adapter may be mounted with, and how a layer or two may differ from the rest.

    use_scalar      a trained scalar, 0 at the start, multiplies the update; no factor starts at 0
    dropout         each entry of what the change sees is dropped:    (W' - W) (mask * x / (1 - p))
    rank_dropout    each rank-one term of the update is dropped:      T(factors * mask / (1 - p))
    module_dropout  the whole change of a layer is dropped:           mask / (1 - p) * (W' - W) x
    max_norm        largest Frobenius norm of W' - W, restored by `Mounted.limit_norms`

Dropouts act while the adapter is in training mode, leave the change unbiased, and are drawn on the
device, from the seed, the layer's name and the number of forward passes alone.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from lyco_lab.adapters.base import Adapter, Additive
from lyco_lab.adapters.shapes import Shape, Terms
from lyco_lab.errors import UserError
from lyco_lab.settings import POSITIVE, SHARE

SCALAR = "scalar"  # the factor that `use_scalar` adds to those of the adapter's rule


@dataclass(frozen=True, kw_only=True)
class Options:
    use_scalar: bool = False
    dropout: Annotated[float, SHARE] = 0.0
    rank_dropout: Annotated[float, SHARE] = 0.0
    module_dropout: Annotated[float, SHARE] = 0.0
    max_norm: Annotated[float | None, POSITIVE] = None

    def __post_init__(self) -> None:
        for name in ("dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"{name} is {value!r}, needs a number in [0, 1)")
        if self.max_norm is not None and not (math.isfinite(self.max_norm) and self.max_norm > 0):
            raise UserError(f"max_norm is {self.max_norm!r}, needs null or a finite number > 0")

    @property
    def draws(self) -> bool:
        """Whether anything is drawn at random."""
        return max(self.dropout, self.rank_dropout, self.module_dropout) > 0

    def terms(self, adapter: Adapter, shape: Shape) -> Terms:
        """The terms of the adapter's T when it is mounted with these options."""
        added = (SCALAR,) if self.use_scalar else ()
        return tuple((*term, *added) for term in adapter.terms(shape))

    def zero(self, adapter: Adapter) -> tuple[str, ...]:
        """The factors, any of which may be absent, that are 0 when it is mounted with these."""
        return (SCALAR,) if self.use_scalar else adapter.zero

    def check(self, adapter: Adapter, shape: Shape, layer: str) -> None:
        """Raise an error where an option would do nothing, or cannot be done."""
        kind, inner = type(adapter).__name__, adapter.inner
        names = inner.factor_shapes(shape)
        if self.use_scalar:
            product = isinstance(inner, Additive) and min(map(len, inner.terms(shape))) > 1
            # What an untrained copy takes away at the start is zero whatever scales it.
            product = product and not inner.untrained.intersection(inner.scaling)
            if not (product and any(name in names for name in inner.scaling)):
                raise UserError(
                    f"use_scalar needs an update that is a product of factors, which that of "
                    f"{kind} is not: leave it out"
                )
        if self.rank_dropout and not any(name in names for name in inner.components):
            raise UserError(
                f"rank_dropout is {self.rank_dropout}, but the update of {kind} has no rank-one "
                f"terms to drop here: use dropout or module_dropout, or leave the layer out"
            )
        if self.dropout and layer in ("Embedding",):
            raise UserError(
                f"dropout is {self.dropout}, but what an {layer} sees are whole numbers: "
                "use module_dropout"
            )
        if self.dropout and adapter.takes == "norm":
            raise UserError(
                f"dropout is {self.dropout}, but what {kind} scales is the normalised input, which "
                "it would not leave unbiased: use module_dropout"
            )
        if self.max_norm is not None and not any(name in names for name in adapter.scaling):
            raise UserError(
                f"max_norm is {self.max_norm}, but no factor of {kind} scales its update: "
                "leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class Override:
    """What is different on the layers that a pattern matches. None: as on the others."""

    adapter: Adapter | None = None
    rank: int | None = None
    alpha: float | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"the lr of an override is {self.lr!r}, needs a finite number > 0")

    def of(self, adapter: Adapter) -> Adapter:
        """The adapter to use in the place of `adapter`."""
        adapter = adapter if self.adapter is None else self.adapter
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if value is None:
                continue
            if not hasattr(adapter, name):
                raise UserError(f"an override sets {name} = {value}, which {adapter} has not")
            changed = {name: value}
            if hasattr(adapter, f"conv_{name}"):
                changed[f"conv_{name}"] = None  # the override speaks of all layers it matches
            adapter = replace(adapter, **changed)
        return adapter
