"""Hypothesis strategies: adapters, weights, layers and seeds worth drawing.

Sizes are small, composite, and rarely square, so that no axis can be taken for another; alphas are
never whole, so that no gamma = alpha / rank is 1 by accident.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.base import Adapter, Additive
from lyco_lab.adapters.shapes import Factors
from lyco_lab.errors import UserError

# The machine's other work decides how long an example takes, and a test that passed passes again.
settings.register_profile("lyco_lab", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lyco_lab")

seeds = st.integers(min_value=0, max_value=2**32 - 1)
sides = st.sampled_from([4, 6, 8, 10, 12, 16, 20, 24])
kernels = st.sampled_from([(), (), (1,), (3,), (1, 1), (3, 3), (2, 3), (1, 2, 3)])
alphas = st.sampled_from([0.5, 1.5, 2.5, 6.5])
ranks = st.integers(min_value=1, max_value=4)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """A weight's shape: linear or a convolution of one to three dimensions."""
    return (draw(sides), draw(sides), *draw(kernels))


# By a field's name, what is worth drawing for it; booleans are drawn, all else keeps its default.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "rank": ranks,
    "alpha": alphas,
    "conv_rank": st.none() | ranks,
    "conv_alpha": st.none() | alphas,
    "full_alpha": alphas,
    "factor": st.sampled_from([2, 3, 4, 8]),
    "block_size": st.sampled_from([2, 3, 4, 8]),
    "constraint": st.sampled_from([0.0, 0.0, 0.05]),
    "axis": st.sampled_from(["out", "in"]),
    "start_from": st.sampled_from(["principal", "last", "middle"]),
}


def adapters(cls: type[Adapter]) -> st.SearchStrategy[Adapter]:
    """Adapters of one class. A field not named above is drawn if boolean, else left as it is.

    An adapter that wraps another is drawn around each kind that can be wrapped.
    """
    fields = {
        field.name: FIELDS.get(field.name, st.booleans())
        for field in dataclasses.fields(cls)
        if field.name in FIELDS or isinstance(field.default, bool)
    }
    if "factor" in fields:
        fields["rank"] = ranks | st.just(10000)  # asks for full blocks
    if "of" in {field.name for field in dataclasses.fields(cls)}:
        wrapped = [
            kind
            for kind in ADAPTERS.values()
            if issubclass(kind, Additive) and kind.takes == "matrix"
        ]
        fields["of"] = st.sampled_from(wrapped).flatmap(adapters)
    return st.builds(cls, **fields)


@st.composite
def adapters_on(draw: st.DrawFn, cls: type[Adapter], shape: tuple[int, ...]) -> Adapter:
    """Adapters of one class that can take a weight of this shape."""
    adapter = draw(adapters(cls))
    try:
        adapter.check(shape)
    except UserError:
        reject()
    return adapter


@st.composite
def shapes_of(draw: st.DrawFn, cls: type[Adapter]) -> tuple[int, ...]:
    """Shapes of what the adapter is for."""
    return draw(shapes()) if cls.takes == "matrix" else (draw(sides),)


def random_weight(shape: tuple[int, ...], seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=rng)


def random_factors(adapter: Adapter, weight: Tensor, seed: int) -> Factors:
    """Generic factors: none zero, nothing special about any."""
    rng = torch.Generator().manual_seed(seed)
    shapes = adapter.factor_shapes(tuple(weight.shape))
    return {
        name: torch.randn(shape, dtype=weight.dtype, generator=rng)
        for name, shape in shapes.items()
    }


# A layer and the shape of an input that it takes: every geometry a product may get wrong.
Geometry = tuple[Callable[[], nn.Module], tuple[int, ...]]
GEOMETRIES: dict[str, Geometry] = {
    "linear": (lambda: nn.Linear(8, 12), (2, 5, 8)),
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), (7, 12)),
    "linear of a vector": (lambda: nn.Linear(12, 8), (12,)),
    "1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 7, 9)),
    "3x3": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 7, 9)),
    "strided": (lambda: nn.Conv2d(4, 8, 3, stride=2, bias=False), (2, 4, 8, 9)),
    "dilated": (lambda: nn.Conv2d(4, 8, (3, 2), dilation=(2, 1)), (2, 4, 9, 8)),
    "circular": (
        lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
        (2, 4, 7, 9),
    ),
    "reflected": (
        lambda: nn.Conv2d(4, 8, 3, padding=(2, 1), padding_mode="reflect"),
        (2, 4, 7, 9),
    ),
    "replicated": (
        lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1, padding_mode="replicate"),
        (2, 4, 9),
    ),
    "same": (lambda: nn.Conv2d(4, 8, (2, 3), padding="same", dilation=(2, 1)), (2, 4, 7, 9)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 7, 9)),
    "unbatched": (lambda: nn.Conv2d(4, 8, 3, padding=1), (4, 7, 9)),
    "1d": (lambda: nn.Conv1d(4, 8, 3, padding="same"), (2, 4, 9)),
    "3d": (lambda: nn.Conv3d(4, 8, (1, 2, 3)), (1, 4, 3, 4, 5)),
}
OTHERS: dict[str, Geometry] = {  # not x -> W x at each position
    "embedding": (lambda: nn.Embedding(12, 8, padding_idx=3), (2, 5)),
}
NORMS: dict[str, Geometry] = {
    "layer norm": (lambda: nn.LayerNorm(8), (2, 5, 8)),
    "layer norm of two axes": (lambda: nn.LayerNorm((4, 6), bias=False), (2, 4, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 8), (2, 8, 5, 3)),
    "rms norm": (lambda: nn.RMSNorm(8), (2, 5, 8)),
}
LAYERS = GEOMETRIES | OTHERS | NORMS


def layers_for(cls: type[Adapter]) -> list[str]:
    """Names of the layers that an adapter is for."""
    return list(NORMS) if cls.takes == "norm" else [*GEOMETRIES, *OTHERS]


def layer_and_input(geometry: str, seed: int) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[geometry]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = make()
        for parameter in layer.parameters():  # norms start at one and zero, where much looks right
            if geometry in NORMS:
                parameter.data += 0.3 * torch.randn(parameter.shape)
        if isinstance(layer, nn.Embedding):
            return layer, torch.randint(layer.num_embeddings, shape)
        return layer, torch.randn(shape)


def move(mounted: Any, seed: int, size: float = 0.3) -> None:
    """Take the factors away from where they start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in mounted.parameters():
            noise = torch.randn(factor.shape, generator=rng, dtype=torch.float64)
            factor += size * noise.to(factor.dtype)
