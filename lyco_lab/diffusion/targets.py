"""Which layers of a Stable Diffusion each preset adapts.

    preset      UNet                                        text encoders (CLIP)
    attn-only   projections of self- and cross-attention    q, k, v and out projections
    attn-mlp    all of each transformer block, with its     attention and MLP
                feed-forward and 1x1 proj_in, proj_out
    full        + resnets, down- and up-samplers, conv_in,  attention and MLP
                conv_out, time embedding

These are the paper's three. Linear layers and convolutions are adapted; norms and embeddings are
not. A layer belongs to a preset when a block of a listed class, or a listed name, contains it.

Of a denoiser that is a transformer, attn-only takes the attention, attn-mlp the feed-forward with
it, and full every layer. Of T5 the attention and the feed-forward are called by other names.
"""

from torch import nn

from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.geometry import CONVOLUTIONS
from lyco_lab.adapters.layers import shape_of
from lyco_lab.adapters.options import Override
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


def match(root: nn.Module, preset: str, part: str) -> list[str]:
    """Names of the layers of `root` that `preset` adapts, in the order of the model."""
    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise UserError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}: one of {known}")
    if part not in PARTS:
        raise UserError(f"unknown part {part!r}{nearest(part, PARTS)}: one of {', '.join(PARTS)}")
    kind = "text_encoder" if part in TEXT_ENCODERS else part
    blocks = [
        f"{name}." if name else ""
        for name, module in root.named_modules()
        if BLOCKS[preset][kind] & {cls.__name__ for cls in type(module).__mro__}
    ]
    loose = LOOSE.get((preset, part), set())
    names = [
        name
        for name, module in root.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS))
        and (name in loose or any(name.startswith(block) for block in blocks))
    ]
    if not names:
        wanted = ", ".join(sorted(BLOCKS[preset][kind] | loose))
        raise UserError(
            f"preset {preset!r} matches no layer of the {part} {type(root).__name__}: "
            f"it has none of {wanted}"
        )
    return names


def fitting(root: nn.Module, adapter: Adapter, names: list[str]) -> dict[str, Override]:
    """What a preset changes on layers narrower than the adapter's rank, such as `conv_out`.

    There the rank is what the layer allows, with the same gamma: the rest could add nothing.
    """
    narrower = {}
    for name in names:
        fitted = adapter.fitted(shape_of(root.get_submodule(name)))
        if fitted != adapter:
            narrower[name] = Override(adapter=fitted)
    return narrower
