"""What the weights of diffusers' and transformers' networks are called in the original code.

`locate` answers for one weight of a network: which tensor of the file it is, and what has to be
done to it. Blocks of the UNet that diffusers nests are numbered through in the original: with L
resnets per block,

    down_blocks.i.resnets.j      input_blocks.(1 + i (L + 1) + j).0
    up_blocks.i.resnets.j        output_blocks.(i (L + 1) + j).0

attention comes after the resnet of its place, and what halves or doubles the size comes last. The
VAE's decoder counts its blocks from the end that has the image. OpenCLIP stacks the projections of
an attention, queries, keys and values, in one matrix.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Change = Callable[[Tensor], Tensor]
Place = tuple[str, Change]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
}
VAE = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def unet(name: str, config: Mapping[str, Any]) -> Place:
    per_block = config.get("layers_per_block", 2) + 1
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if block is None:
        middle = re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", name)
        if middle:
            return f"middle_block.{2 * int(middle[1])}.{_renamed(middle[2], RESNET)}", same
        return _renamed(name, UNET), same
    side, i, kind, j, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    first = i * per_block + (side == "down")
    blocks, last = ("input_blocks" if side == "down" else "output_blocks"), first + per_block - 1
    if kind == "resnets":
        return f"{blocks}.{first + j}.0.{_renamed(rest, RESNET)}", same
    if kind == "attentions":
        return f"{blocks}.{first + j}.1.{rest}", same
    if kind == "downsamplers":
        return f"{blocks}.{last}.0.{_renamed(rest, {'conv': 'op'})}", same
    attends = "CrossAttn" in config["up_block_types"][i]
    return f"{blocks}.{last}.{1 + attends}.{rest}", same


def vae(name: str, config: Mapping[str, Any]) -> Place:
    last = len(config["block_out_channels"]) - 1

    def resnet(match: re.Match[str]) -> str:
        return f"mid.block_{int(match[1]) + 1}"

    def up(match: re.Match[str]) -> str:
        return f"up.{last - int(match[1])}"

    found = re.sub(r"mid_block\.resnets\.(\d)", resnet, name)
    found = re.sub(r"up_blocks\.(\d+)", up, found)
    found = re.sub(r"down_blocks\.(\d+)", r"down.\1", found).replace(".resnets.", ".block.")
    within = ".attentions." in name  # its projections are convolutions of one tap there
    change = flat if within and name.endswith(".weight") and "norm" not in name else same
    return _renamed(found, VAE), change


def clip(name: str, config: Mapping[str, Any]) -> Place:
    return "text_model." + name.removeprefix("text_model."), same


def open_clip(name: str, config: Mapping[str, Any]) -> Place:
    if name == "text_projection.weight":
        return "text_projection", transposed
    found = _renamed(name.removeprefix("text_model."), OPEN_CLIP)
    projection = re.fullmatch(r"(.+\.attn)\.([qkv])_proj\.(weight|bias)", found)
    if projection is None:
        return found, same
    stem, which, kind = projection.groups()

    def third(stacked: Tensor) -> Tensor:
        return stacked.chunk(3)["qkv".index(which)]

    return f"{stem}.in_proj_{kind}", third


def same(tensor: Tensor) -> Tensor:
    return tensor


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """`name` with whole components replaced."""
    for ours, theirs in table.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(ours)}(?=\.|$)", theirs, name)
    return name
