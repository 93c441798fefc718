"""Write a diffusers folder's weights as one file, in the key layout of the original code.

Blocks are counted through as the original code builds them; what `original_names` computes by a
formula is thus said a second time, and a test has diffusers' own reader agree.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.", "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
VAE_ATTENTION = {
    "group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out.",
}  # fmt: skip


def tensors(folder: Path) -> dict[str, Tensor]:
    """All of a single file's, for an SD 1, SD 2 or SDXL in `folder`."""
    found = {f"model.diffusion_model.{k}": v for k, v in unet(part(folder, "unet")).items()}
    found |= {f"first_stage_model.{k}": v for k, v in vae(part(folder, "vae")).items()}
    text = part(folder, "text_encoder")
    if (folder / "text_encoder_2").is_dir():
        found |= clip("conditioner.embedders.0.transformer.", text)
        second = part(folder, "text_encoder_2")
        found |= open_clip("conditioner.embedders.1.model.", second)
    elif '"gelu"' in (folder / "text_encoder" / "config.json").read_text():
        found |= open_clip("cond_stage_model.model.", text)
        more = {k: v + 1 for k, v in found.items() if ".resblocks.2." in k}
        found |= {k.replace(".2.", ".3."): v for k, v in more.items()}  # the layer it does without
    else:
        found |= clip("cond_stage_model.transformer.", text)
    return {key: tensor.clone().contiguous() for key, tensor in found.items()}


def part(folder: Path, name: str) -> dict[str, Tensor]:
    (file,) = (folder / name).glob("*.safetensors")
    return safetensors.torch.load_file(file)


def with_average(found: dict[str, Tensor], change: float) -> dict[str, Tensor]:
    """The file of a training that kept an average of the denoiser, which is off by `change`."""
    average = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor + change
        for key, tensor in found.items()
        if key.startswith("model.diffusion_model.")
    }
    return found | average | {"model_ema.decay": torch.tensor(0.9999)}


def save_ckpt(found: dict[str, Tensor], path: Path, **more: Any) -> Path:
    torch.save({"state_dict": found, "global_step": 7, **more}, path)
    return path


def save_safetensors(found: dict[str, Tensor], path: Path, **metadata: str) -> Path:
    safetensors.torch.save_file(found, path, metadata)
    return path


def unet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("down_blocks."))
    resnets = 1 + max(
        int(k.split(".")[3]) for k in weights if k.startswith("down_blocks.0.resnets")
    )
    places = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }
    count = 0
    for i in range(blocks):
        for j in range(resnets):
            count += 1
            places[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{count}.0."
            places[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{count}.1."
        if i < blocks - 1:
            count += 1
            places[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{count}.0.op."
    count = -1
    for i in range(blocks):
        for j in range(resnets + 1):
            count += 1
            places[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{count}.0."
            places[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{count}.1."
        attends = any(k.startswith(f"up_blocks.{i}.attentions") for k in weights)
        after = 2 if attends else 1
        places[f"up_blocks.{i}.upsamplers.0.conv."] = f"output_blocks.{count}.{after}.conv."
    return {moved(key, places, "resnets"): tensor for key, tensor in weights.items()}


def moved(key: str, places: dict[str, str], resnets: str) -> str:
    (start,) = [place for place in places if key.startswith(place)]
    rest = key.removeprefix(start)
    if resnets in start:
        for ours, theirs in RESNET.items():
            rest = theirs + rest.removeprefix(ours) if rest.startswith(ours) else rest
    return places[start] + rest


def vae(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks = 1 + max(int(k.split(".")[2]) for k in weights if "down_blocks." in k)
    found = {}
    for key, tensor in weights.items():
        for i in range(blocks):
            key = key.replace(f"encoder.down_blocks.{i}.", f"encoder.down.{i}.")
            key = key.replace(f"decoder.up_blocks.{i}.", f"decoder.up.{blocks - 1 - i}.")
        key = key.replace(".mid_block.resnets.0.", ".mid.block_1.")
        key = key.replace(".mid_block.resnets.1.", ".mid.block_2.")
        key = key.replace(".resnets.", ".block.").replace(".conv_shortcut.", ".nin_shortcut.")
        key = key.replace(".downsamplers.0.", ".downsample.").replace(
            ".upsamplers.0.", ".upsample."
        )
        key = key.replace(".conv_norm_out.", ".norm_out.")
        if ".mid_block.attentions.0." in key:
            key = key.replace(".mid_block.attentions.0.", ".mid.attn_1.")
            for ours, theirs in VAE_ATTENTION.items():
                key = key.replace(ours, theirs)
            if tensor.dim() == 2:
                tensor = tensor[:, :, None, None]
        found[key] = tensor
    return found


def clip(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {f"{prefix}text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()}
    return found | {f"{prefix}text_model.embeddings.position_ids": torch.arange(32)[None]}


def open_clip(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {k.removeprefix("text_model."): v for k, v in weights.items()}
    found = {
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "logit_scale": torch.tensor(4.6),
    }
    if "text_projection.weight" in weights:
        found["text_projection"] = weights["text_projection.weight"].T
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = weights[f"final_layer_norm.{kind}"]
        layer = 0
        while f"encoder.layers.{layer}.mlp.fc1.bias" in weights:
            ours, theirs = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
            heads = [weights[f"{ours}self_attn.{which}_proj.{kind}"] for which in "qkv"]
            found[f"{theirs}attn.in_proj_{kind}"] = torch.cat(heads)
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                found[f"{theirs}{b}.{kind}"] = weights[f"{ours}{a}.{kind}"]
            layer += 1
    return {prefix + key: tensor for key, tensor in found.items()}
