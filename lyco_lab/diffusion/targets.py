"""Which layers of a Stable Diffusion each preset adapts.

    preset      UNet                                        text encoders (CLIP)
    attn-only   projections of self- and cross-attention    q, k, v and out projections
    attn-mlp    all of each transformer block, with its     attention and MLP
                feed-forward and 1x1 proj_in, proj_out
    full        + resnets, down- and up-samplers, conv_in,  attention and MLP
                conv_out, time embedding

These are the paper's three. Linear layers and convolutions are adapted; embeddings are not. A layer
belongs to a preset when a block of a listed class, or a listed name, contains it.

Of a denoiser that is a transformer, attn-only takes the attention, attn-mlp the feed-forward with
it, and full every layer. Of T5 the attention and the feed-forward are called by other names.

With `train_norm` the norm layers that scale their input train beside the adapter, where they lie in
the preset's blocks. This is LyCORIS' rule, which the paper's runs with `full` followed:

    attn-only   none, as an attention block contains none: an error
    attn-mlp    norm, norm1, norm2 and norm3 of each transformer block of the UNet
    full        + norm1 and norm2 of each resnet

In no block, and so frozen, are the UNet's conv_norm_out and all norms of a text encoder: CLIP's lie
around its attention and MLP. Each is a `Norm` with gamma = 1, whatever the gamma of the adapter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lyco_lab.adapters.adapted_layer import shape_of
from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.geometry import CONVOLUTIONS, NORMS
from lyco_lab.adapters.norm import Norm
from lyco_lab.adapters.options import Override
from lyco_lab.config import Model
from lyco_lab.errors import UserError, nearest

PRESETS = ("attn-only", "attn-mlp", "full")
DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = (*DENOISERS, *TEXT_ENCODERS)

# Class names, not classes: both libraries keep several classes of one name and role.
ATTENTION = {
    "unet": {"Attention"},
    "transformer": {"Attention"},
    "text_encoder": {"CLIPAttention", "T5Attention"},
}
TRANSFORMER = {
    "unet": ATTENTION["unet"] | {"Transformer2DModel"},
    "transformer": ATTENTION["transformer"] | {"FeedForward"},
    "text_encoder": ATTENTION["text_encoder"]
    | {"CLIPMLP", "T5DenseActDense", "T5DenseGatedActDense"},
}
EVERYTHING = {
    "unet": TRANSFORMER["unet"]
    | {"ResnetBlock2D", "Downsample2D", "Upsample2D", "TimestepEmbedding"},
    "transformer": {"SD3Transformer2DModel"},
    "text_encoder": TRANSFORMER["text_encoder"],
}
BLOCKS = dict(zip(PRESETS, (ATTENTION, TRANSFORMER, EVERYTHING), strict=True))
LOOSE = {("full", "unet"): {"conv_in", "conv_out"}}  # layers of a preset in no block


@dataclass(frozen=True)
class Chosen:
    """The layers of a part of the model that a run trains."""

    names: list[str]
    narrowed: dict[str, Override]  # too narrow for the adapter's rank: there it is smaller
    norms: dict[str, Override]  # beside those of the adapter

    @property
    def overrides(self) -> dict[str, Override]:
        """Where the adapter is another than the run's."""
        return self.narrowed | self.norms


def chosen(root: nn.Module, part: str, model: Model, adapter: Adapter) -> Chosen:
    """What a run with this adapter and these settings of its model trains of `root`."""
    if adapter.takes == "norm":
        raise UserError(
            f"adapter.kind is {type(adapter).__name__.lower()!r}, but presets are of layers that "
            "multiply by a matrix: model.train_norm trains norm layers beside another adapter"
        )
    names, norms = match(root, model.preset, part), []
    if model.train_norm:
        norms = _norms(root, model.preset, part)
    if model.train_norm and part in DENOISERS and not norms:
        raise UserError(
            f"model.train_norm is true, but no norm layer of the {part} that scales its input "
            f"lies in the blocks of preset {model.preset!r}: use a larger preset, or leave it out"
        )
    beside = dict.fromkeys(norms, Override(adapter=Norm()))
    return Chosen([*names, *norms], _fitting(root, adapter, names), beside)


def match(root: nn.Module, preset: str, part: str) -> list[str]:
    """Names of the layers of `root` that `preset` adapts, in the order of the model."""
    kinds = (nn.Linear, *CONVOLUTIONS)
    names = [name for name, layer in _inside(root, preset, part) if isinstance(layer, kinds)]
    if not names:
        wanted = ", ".join(sorted(_blocks(preset, part) | _loose(preset, part)))
        raise UserError(
            f"preset {preset!r} matches no layer of the {part} {type(root).__name__}: "
            f"it has none of {wanted}"
        )
    return names


def _norms(root: nn.Module, preset: str, part: str) -> list[str]:
    return [
        name
        for name, layer in _inside(root, preset, part)
        if isinstance(layer, NORMS) and layer.weight is not None
    ]


def _inside(root: nn.Module, preset: str, part: str) -> Iterator[tuple[str, nn.Module]]:
    """All modules in the preset's blocks, and those that it names."""
    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise UserError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}: one of {known}")
    if part not in PARTS:
        raise UserError(f"unknown part {part!r}{nearest(part, PARTS)}: one of {', '.join(PARTS)}")
    classes, loose = _blocks(preset, part), _loose(preset, part)
    blocks = tuple(
        f"{name}." if name else ""
        for name, module in root.named_modules()
        if classes & {cls.__name__ for cls in type(module).__mro__}
    )
    for name, module in root.named_modules():
        if name in loose or name.startswith(blocks):
            yield name, module


def _blocks(preset: str, part: str) -> set[str]:
    return BLOCKS[preset]["text_encoder" if part in TEXT_ENCODERS else part]


def _loose(preset: str, part: str) -> set[str]:
    return LOOSE.get((preset, part), set())


def _fitting(root: nn.Module, adapter: Adapter, names: list[str]) -> dict[str, Override]:
    """What a preset changes on layers narrower than the adapter's rank, such as `conv_out`.

    There the rank is what the layer allows, with the same gamma: the rest could add nothing.
    """
    narrower = {}
    for name in names:
        fitted = adapter.fitted(shape_of(root.get_submodule(name)))
        if fitted != adapter:
            narrower[name] = Override(adapter=fitted)
    return narrower
