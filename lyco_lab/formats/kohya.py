"""Adapter files in the safetensors layout of kohya's scripts and LyCORIS.

    lora_unet_LAYER.SUFFIX              LAYER is the module's path with '_' for '.'
    lora_te_text_model_LAYER.SUFFIX     the CLIP text encoder, whether or not its class still has
                                        the `text_model` wrapper that the layout spells out

Each adapter's own file says how its factors are called here. `alpha` is a scalar per layer, from
which readers recompute gamma = alpha / rank. The metadata hold what other readers look for
(`ss_*`) and `lyco_lab.adapter`, the adapter of each part in full, so nothing is guessed on loading.
Factors are written in the precision they trained in, and the same factors give the same bytes.
"""

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.base import Adapter, Ranked, Shape
from lyco_lab.adapters.mount import Mounted, attach
from lyco_lab.adapters.targeting import SUPPORTED
from lyco_lab.errors import UserError, nearest
from lyco_lab.record import atomic

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
OURS = "lyco_lab.adapter"  # the metadata key under which a file names its adapters

Layers = dict[str, dict[str, Tensor]]  # the layer as the file calls it -> suffix -> tensor


def save(path: Path, parts: Mapping[str, Mounted], metadata: Mapping[str, str]) -> None:
    """Write the adapters mounted on `parts` ("unet", "text_encoder") to one file."""
    path = Path(path)
    if not parts:
        raise UserError(f"cannot write {path}: no part carries an adapter")
    if path.exists() and OURS not in _metadata(path):
        raise UserError(f"{path} is not a file of lyco_lab: move it away or write elsewhere")
    tensors: dict[str, Tensor] = {}
    for part, mounted in parts.items():
        for name in mounted.layers:
            for suffix, tensor in _file_tensors(mounted, name).items():
                key = f"{file_layer(part, name)}.{suffix}"
                if key in tensors:
                    raise UserError(f"two layers of the {part} are both {key} in a kohya file")
                tensors[key] = tensor
    adapters = {part: mounted.adapter for part, mounted in parts.items()}
    data = safetensors.torch.save(tensors, {**_standard_metadata(adapters), **metadata})
    with atomic(path) as temporary:
        temporary.write_bytes(_in_order(data))


def load(path: Path) -> tuple[dict[str, Layers], dict[str, str]]:
    """The tensors of a file by part and layer, and its metadata."""
    metadata = _metadata(path)
    parts: dict[str, Layers] = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        layer, _, suffix = key.partition(".")
        part = next((part for part, prefix in PREFIXES.items() if key.startswith(prefix)), None)
        if part is None or not suffix:
            known = ", ".join(PREFIXES.values())
            raise UserError(f"{path} holds {key!r}: an adapter's keys begin with one of {known}")
        parts.setdefault(part, {}).setdefault(layer, {})[suffix] = tensor
    return parts, metadata


def apply(path: Path, models: Mapping[str, nn.Module]) -> dict[str, Mounted]:
    """Mount a file written by `save` on the models it was trained on, or on others of their kind.

    Everything is checked before a model is touched. A model that the file has nothing for stays
    as it is; a part of the file without a model is an error.
    """
    parts, metadata = load(path)
    adapters = _adapters(path, metadata)
    states: dict[str, dict[str, Tensor]] = {}
    names: dict[str, list[str]] = {}
    for part, layers in parts.items():
        if part not in models or part not in adapters:
            lacking = "model was given" if part not in models else f"adapter is in its {OURS!r}"
            raise UserError(f"{path} adapts the {part}, but no {lacking} for it")
        known = {
            file_layer(part, name): (name, tuple(module.weight.shape))
            for name, module in models[part].named_modules()
            if isinstance(module, SUPPORTED)
        }
        states[part], names[part] = {}, []
        for layer, tensors in layers.items():
            if layer not in known:
                kind = type(models[part]).__name__
                raise UserError(f"{path}: {kind} has no layer {layer!r}{nearest(layer, known)}")
            name, shape = known[layer]
            names[part].append(name)
            factors = _factors(f"{path}, {layer}", adapters[part], tensors, shape)
            states[part] |= {f"{name}.{key}": factor for key, factor in factors.items()}
    mounted = {part: attach(models[part], adapters[part], names[part], seed=0) for part in states}
    for part, state in states.items():
        mounted[part].load_state_dict(state)
    return mounted


def file_layer(part: str, name: str) -> str:
    """What the layout calls the layer `name` of a part."""
    if part not in PREFIXES:
        raise UserError(f"unknown part {part!r}{nearest(part, PREFIXES)}: {', '.join(PREFIXES)}")
    if part == "text_encoder":
        name = name.removeprefix("text_model.")
    return PREFIXES[part] + name.replace(".", "_")


def _file_tensors(mounted: Mounted, name: str) -> dict[str, Tensor]:
    adapter, shape = mounted.adapter, tuple(mounted.base_weight(name).shape)
    tensors = {}
    for key, factor in mounted.factors(name).items():
        suffix = adapter.file_names[key]
        tensors[suffix] = factor.detach().cpu().contiguous()
        if suffix.endswith(".weight"):  # weights of a layer of this kind: convolutions get taps
            missing = len(shape) - factor.dim()
            tensors[suffix] = tensors[suffix].view(*factor.shape, *[1] * missing)
    alpha = adapter.file_alpha(shape)
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    return tensors


def _factors(
    where: str, adapter: Adapter, tensors: Mapping[str, Tensor], shape: Shape
) -> dict[str, Tensor]:
    """The factors that `_file_tensors` wrote, checked against what the adapter needs."""
    adapter.check(shape)
    factors = {}
    needed = adapter.factor_shapes(shape)
    left = dict(tensors)
    for key, factor_shape in needed.items():
        suffix = adapter.file_names[key]
        tensor = left.pop(suffix, None)
        if tensor is None:
            raise UserError(f"{where}: {adapter} needs {suffix!r}, the file has {sorted(tensors)}")
        if tensor.numel() != torch.Size(factor_shape).numel():
            raise UserError(
                f"{where}: {suffix!r} has shape {tuple(tensor.shape)}, "
                f"{adapter} needs {factor_shape} for a weight of shape {shape}"
            )
        factors[key] = tensor.view(factor_shape)
    alpha, expected = left.pop("alpha", None), adapter.file_alpha(shape)
    if expected is not None and (alpha is None or alpha != torch.tensor(expected)):
        given = None if alpha is None else alpha.item()
        raise UserError(f"{where}: alpha is {given}, but {adapter} means {expected}")
    if left:
        raise UserError(f"{where}: {adapter} has no use for {sorted(left)}")
    return factors


def _standard_metadata(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """The least that readers of the layout look for, and our own exact description."""
    first = next(iter(adapters.values()))
    fields = dataclasses.asdict(first)
    arguments: dict[str, Any] = {"algo": first.file_algo}
    rank, alpha = fields.pop("rank", 1), fields.pop("alpha", 1.0)
    if isinstance(first, Ranked):
        conv_rank, conv_alpha = fields.pop("conv_rank"), fields.pop("conv_alpha")
        arguments["conv_dim"] = rank if conv_rank is None else conv_rank
        arguments["conv_alpha"] = alpha if conv_alpha is None else conv_alpha
    described = {
        part: {"kind": type(adapter).__name__.lower(), **dataclasses.asdict(adapter)}
        for part, adapter in adapters.items()
    }
    return {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps({**arguments, **fields}),
        OURS: json.dumps(described),
    }


def _adapters(path: Path, metadata: Mapping[str, str]) -> dict[str, Adapter]:
    if OURS not in metadata:
        raise UserError(f"{path} has no {OURS!r} in its metadata: it was not written by lyco_lab")
    adapters = {}
    for part, fields in json.loads(metadata[OURS]).items():
        kind = fields.pop("kind")
        if kind not in ADAPTERS:
            raise UserError(f"{path} holds an unknown adapter {kind!r}{nearest(kind, ADAPTERS)}")
        try:
            adapters[part] = ADAPTERS[kind](**fields)
        except TypeError as error:
            raise UserError(f"{path}: its {kind} was written with other fields: {error}") from error
    return adapters


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"there is no adapter file {path}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error


def _in_order(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: the library writes them in any order."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]
