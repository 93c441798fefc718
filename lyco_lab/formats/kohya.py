"""Adapter files in the safetensors layout of kohya's scripts and LyCORIS.

    lora_unet_LAYER.SUFFIX              LAYER is the module's path with '_' for '.'
    lora_te_text_model_LAYER.SUFFIX     the CLIP text encoder, whether or not its class still has
                                        the `text_model` wrapper that the layout spells out
    lora_te1_, lora_te2_text_model_…    the text encoders of a model that has several
    lora_transformer_LAYER.SUFFIX       a denoiser that is a transformer

Each adapter's own file says how its factors are called here. Beside them a layer has

    alpha               a scalar from which readers recompute gamma = alpha / rank
    diff_b, b_norm      what the layer's bias gains, of a norm layer the latter

The metadata hold what other readers look for (`ss_*`) and, so that nothing is guessed on loading,
`lyco_lab.adapter`, the adapter of each part in full, `lyco_lab.layers`, the adapters of the layers
that have another one, `lyco_lab.options`, and `lyco_lab.digest`, a digest of those three and of all
tensors by which a damaged file is recognised. A scalar that trained beside the factors is
multiplied into them. Factors are written in the precision they trained in unless told otherwise,
and the same factors give the same bytes.

`foreign.py` reads files of the same layout that other programs wrote.
"""

import dataclasses
import glob
import hashlib
import json
import struct
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lyco_lab.adapters import ADAPTERS, build, describe
from lyco_lab.adapters.adapted_layer import shape_of
from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.layer_adapter import BIAS
from lyco_lab.adapters.merging import original
from lyco_lab.adapters.mount import Mounted, attach
from lyco_lab.adapters.options import SCALAR, Options, Override
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.adapters.targeting import SUPPORTED
from lyco_lab.errors import UserError, nearest
from lyco_lab.files import atomic
from lyco_lab.kinds import check_type
from lyco_lab.readers import Damaged, read_safetensors
from lyco_lab.user_classes import is_path

PREFIXES = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te_text_model_",
    "text_encoder_2": "lora_te2_text_model_",
    "text_encoder_3": "lora_te3_",
}
FIRST_OF_SEVERAL = "lora_te1_text_model_"  # the text encoder, where it is not the only one
OURS = "lyco_lab.adapter"  # the metadata key under which a file names its adapters
LAYERS, OPTIONS = "lyco_lab.layers", "lyco_lab.options"
DIGEST = "lyco_lab.digest"
ALPHA = "alpha"
CHOICE = "on_input"  # no factor, but which side (IA)3 scales
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of a file of ours

# How LyCORIS calls settings that have another name here.
ARGUMENTS = {
    "tucker": "use_tucker",
    "rank_stabilised": "rs_lora",
    "unbalanced": "unbalanced_factorization",
}

Layers = dict[str, dict[str, Tensor]]  # the layer as the file calls it -> suffix -> tensor


def save(
    path: Path,
    parts: Mapping[str, Mounted],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapters mounted on `parts` ("unet", "text_encoder") to one file.

    `dtype`, such as torch.float16, makes a smaller file, of factors that are rounded to it.
    """
    path = Path(path)
    if not parts:
        raise UserError(f"cannot write {path}: no part carries an adapter")
    if dtype not in (None, *DTYPES):
        known = ", ".join(map(str, DTYPES))
        raise UserError(f"cannot write {path}: dtype is {dtype}, needs one of {known}")
    if path.exists() and OURS not in read_metadata(path):
        raise UserError(f"{path} is not a file of lyco_lab: move it away or write elsewhere")
    order = list(PREFIXES)  # whatever order the caller has them in
    parts = dict(sorted(parts.items(), key=lambda item: [*order, item[0]].index(item[0])))
    tensors = _all_tensors(parts, dtype)
    ours = _ours(parts)
    ours[DIGEST] = _digest(tensors, ours)
    data = safetensors.torch.save(tensors, {**_standard(parts), **ours, **metadata})
    with atomic(path) as temporary:
        temporary.write_bytes(_in_order(data))


def holds(path: Path, parts: Mapping[str, Mounted]) -> bool:
    """Whether a file, read back, has every bit of what `save` would write of these adapters."""
    (found, _), wanted = read_safetensors(path), _all_tensors(parts, None)
    return found.keys() == wanted.keys() and all(
        found[key].dtype == tensor.dtype
        and found[key].shape == tensor.shape
        and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (found[key], tensor)))
        for key, tensor in wanted.items()
    )


def _all_tensors(parts: Mapping[str, Mounted], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a file by key."""
    several = "text_encoder_2" in parts
    tensors: dict[str, Tensor] = {}
    for part, mounted in parts.items():
        for name in mounted.layers:
            for suffix, tensor in _file_tensors(mounted, name).items():
                key = f"{file_layer(part, name, several=several)}.{suffix}"
                if key in tensors:
                    raise UserError(f"two layers of the {part} are both {key} in a kohya file")
                tensors[key] = _rounded(key, tensor, dtype)
    return tensors


def load(path: Path) -> tuple[dict[str, Layers], dict[str, str]]:
    """The tensors of a file by part and layer, and its metadata.

    Raises `UserError` for a file that cannot be read, a key of no known part, a number that is not
    finite, and a file of ours whose content is not what was written.
    """
    tensors, metadata = read_safetensors(Path(path))
    check_content(path, tensors, metadata)
    parts: dict[str, Layers] = {}
    for key, tensor in tensors.items():
        layer, _, suffix = key.partition(".")
        part = part_of(key)
        if part is None or not suffix:
            known = ", ".join([*PREFIXES.values(), FIRST_OF_SEVERAL])
            raise UserError(f"{path} holds {key!r}: an adapter's keys begin with one of {known}")
        parts.setdefault(part, {}).setdefault(layer, {})[suffix] = tensor
    return parts, metadata


def part_of(key: str) -> str | None:
    """The part of the model that a key speaks of; None where no part is called so."""
    prefixes = [*PREFIXES.items(), ("text_encoder", FIRST_OF_SEVERAL)]
    return next((part for part, prefix in prefixes if key.startswith(prefix)), None)


def check_content(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise an error for what no intact adapter file holds.

    An alpha that is not finite is the adapter's business: LyCORIS writes one for full blocks.
    """
    if OURS in metadata:
        for key, tensor in tensors.items():
            if tensor.dtype not in DTYPES and not key.endswith(f".{CHOICE}"):
                known = ", ".join(map(str, DTYPES))
                raise Damaged(path, f"{key} is of {tensor.dtype}, and was one of {known}")
    if DIGEST in metadata and metadata[DIGEST] != _digest(tensors, metadata):
        raise Damaged(
            path,
            "it does not hold what was written there (its digest differs): restore it or train "
            f"again; if it was edited on purpose, remove {DIGEST!r} from its metadata",
        )
    for key, tensor in tensors.items():
        if key.endswith(f".{ALPHA}") or not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
            raise UserError(
                f"{path}: {key} holds numbers that are not finite, of which no image can be made: "
                "take the adapter of an earlier step, or train with a smaller learning rate"
            )


def apply(
    path: Path, models: Mapping[str, nn.Module], *, partial: bool = False
) -> dict[str, Mounted]:
    """Mount a file written by `save` on the models it was trained on, or on others of their kind.

    Everything is checked before a model is touched. A model that the file has nothing for stays
    as it is; a part of the file without a model is an error, or with `partial` left out.
    """
    parts, metadata = load(path)
    described = _described(path, metadata)
    states: dict[str, dict[str, Tensor]] = {}
    chosen: dict[str, dict[str, Adapter]] = {}
    several = "text_encoder_2" in parts
    if partial and not parts.keys() & models.keys():
        raise UserError(
            f"{path} adapts {' and '.join(parts) or 'nothing'}, but models were given for "
            f"{' and '.join(models) or 'nothing'}: there is nothing to mount"
        )
    for part, layers in parts.items():
        if part not in models and partial:
            continue
        if part not in models:
            raise UserError(
                f"{path} adapts the {part}, but no model was given for it; "
                "partial=True leaves such parts out"
            )
        if part not in described:
            raise UserError(f"{path} adapts the {part}, but no adapter is in its {OURS!r} for it")
        known = file_layers(part, models[part], several=several)
        states[part], chosen[part] = {}, {}
        for layer, tensors in layers.items():
            if len(known.get(layer, [])) != 1:
                kind = type(models[part]).__name__
                if layer in known:
                    raise UserError(f"{path}: {' and '.join(known[layer])} of {kind} are {layer!r}")
                raise UserError(f"{path}: {kind} has no layer {layer!r}{nearest(layer, known)}")
            (name,) = known[layer]
            module, adapter = models[part].get_submodule(name), described[part].of(name)
            factors = read(f"{path}, {layer}", adapter, tensors, module)
            _check_alpha(f"{path}, {layer}", adapter, tensors.get(ALPHA), shape_of(module))
            if described[part].options.use_scalar:
                factors[SCALAR] = torch.ones(())
            chosen[part][name] = adapter
            states[part] |= {f"{name}.{key}": factor for key, factor in factors.items()}
    return {
        part: mount(models[part], described[part].adapter, chosen[part], state, options)
        for part, state in states.items()
        for options in [described[part].options]
    }


def mount(
    model: nn.Module,
    adapter: Adapter,
    chosen: Mapping[str, Adapter],
    state: Mapping[str, Tensor],
    options: Options | None = None,
) -> Mounted:
    """Put on each layer what was chosen for it, mostly `adapter`, with the factors in `state`."""
    overrides = {
        glob.escape(name): Override(adapter=other)
        for name, other in chosen.items()
        if other != adapter
    }
    mounted = attach(model, adapter, list(chosen), seed=0, options=options, overrides=overrides)
    mounted.load_state_dict(state)
    return mounted


def file_layer(part: str, name: str, *, several: bool = False) -> str:
    """What the layout calls the layer `name` of a part. `several`: text encoders are numbered."""
    if part not in PREFIXES:
        raise UserError(f"unknown part {part!r}{nearest(part, PREFIXES)}: {', '.join(PREFIXES)}")
    prefix = FIRST_OF_SEVERAL if several and part == "text_encoder" else PREFIXES[part]
    if prefix.endswith("text_model_"):
        name = name.removeprefix("text_model.")
    return prefix + name.replace(".", "_")


def file_layers(part: str, model: nn.Module, *, several: bool = False) -> dict[str, list[str]]:
    """The layers that can carry an adapter, by what the layout calls them."""
    found = defaultdict(list)
    for name in adaptable(model):
        found[file_layer(part, name, several=several)].append(name)
    return dict(found)


def adaptable(model: nn.Module) -> list[str]:
    """The names of the layers that can carry an adapter."""
    names = []
    for name, module in model.named_modules():
        sizes = (getattr(module, key, None) for key in ("in_features", "out_features"))
        if isinstance(module, SUPPORTED) or all(isinstance(size, int) for size in sizes):
            names.append(name)
    return names


def bias_suffix(adapter: Adapter) -> str:
    return "b_norm" if adapter.takes == "norm" else "diff_b"


def layout(adapter: Adapter, module: nn.Module) -> dict[str, Shape]:
    """The tensors but alpha that a file holds for this adapter on this layer, and their shapes."""
    shape, bias = shape_of(module), original(module).bias
    factors = {
        name: torch.empty(size, device="meta")
        for name, size in adapter.factor_shapes(shape).items()
    }
    tensors = {key: tuple(t.shape) for key, t in adapter.to_file(shape, factors).items()}
    if adapter.trains_bias() and bias is not None:
        tensors[bias_suffix(adapter)] = tuple(bias.shape)
    return tensors


def read(where: str, adapter: Adapter, tensors: Mapping[str, Tensor], module: nn.Module) -> Factors:
    """The factors that these tensors hold, checked against what the adapter needs on the layer."""
    shape = shape_of(module)
    adapter.check(shape)
    left, fitting = dict(tensors), {}
    for suffix, size in layout(adapter, module).items():
        tensor = left.pop(suffix, None)
        if tensor is None:
            raise UserError(f"{where}: {adapter} needs {suffix!r}, the file has {sorted(tensors)}")
        if tensor.numel() != torch.Size(size).numel():
            while len(size) > tensor.dim() and size[-1] == 1:
                size = size[:-1]  # taps that this file does not write either
            raise UserError(
                f"{where}: {suffix!r} has shape {tuple(tensor.shape)}, "
                f"{adapter} needs {size} for a weight of shape {shape}"
            )
        fitting[suffix] = tensor.reshape(size)
    left.pop(ALPHA, None)
    if left:
        raise UserError(f"{where}: {adapter} has no use for {sorted(left)}")
    offset = fitting.pop(bias_suffix(adapter), None) if adapter.trains_bias() else None
    factors = adapter.from_file(shape, fitting)
    return factors if offset is None else {**factors, BIAS: offset}


def read_metadata(path: Path) -> dict[str, str]:
    return read_safetensors(Path(path))[1]


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of the tensors, whatever their order, and of what the metadata say of them."""
    digest = hashlib.blake2b(digest_size=16)
    for key in (OURS, LAYERS, OPTIONS):
        digest.update(f"{key}={metadata.get(key)}\n".encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _file_tensors(mounted: Mounted, name: str) -> dict[str, Tensor]:
    adapter, shape = mounted.adapter_of(name), shape_of(mounted.layers[name])
    factors = mounted.factors(name)
    offset = factors.pop(BIAS, None)
    if SCALAR in factors:
        factors = mounted.rule_factors(name)
    tensors = adapter.to_file(shape, factors)
    if offset is not None:
        tensors[bias_suffix(adapter)] = offset
    tensors = {suffix: tensor.detach().cpu().contiguous() for suffix, tensor in tensors.items()}
    alpha = adapter.file_alpha(shape)
    if alpha is not None:
        tensors[ALPHA] = torch.tensor(float(alpha))
    return tensors


def _rounded(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point() or key.endswith(f".{ALPHA}"):
        return tensor  # an alpha that overflowed or lost digits would scale the whole layer
    rounded = tensor.to(dtype)
    if not torch.equal(torch.isfinite(rounded), torch.isfinite(tensor)):
        raise UserError(
            f"{key} holds {tensor.abs().max().item():.3g}, more than {dtype} can: "
            "write torch.bfloat16 or torch.float32"
        )
    return rounded


def _check_alpha(where: str, adapter: Adapter, alpha: Tensor | None, shape: Shape) -> None:
    expected = adapter.file_alpha(shape)
    if expected is None and alpha is not None:
        raise UserError(f"{where}: {adapter} has no use for {[ALPHA]}")
    if expected is not None and (alpha is None or alpha != torch.tensor(float(expected))):
        given = None if alpha is None else alpha.item()
        raise UserError(f"{where}: alpha is {given}, but {adapter} means {expected}")


@dataclasses.dataclass(frozen=True)
class _Part:
    """What the metadata say of a part."""

    adapter: Adapter
    others: Mapping[str, Adapter]  # of the layers that have another one
    options: Options

    def of(self, name: str) -> Adapter:
        return self.others.get(name, self.adapter)


def _ours(parts: Mapping[str, Mounted]) -> dict[str, str]:
    """The exact description of what was mounted."""
    described: dict[str, Any] = {
        OURS: {part: describe(mounted.adapter) for part, mounted in parts.items()}
    }
    layers, options = {}, {}
    for part, mounted in parts.items():
        groups: dict[Adapter, list[str]] = defaultdict(list)
        for name in mounted.layers:
            if mounted.adapter_of(name) != mounted.adapter:
                groups[mounted.adapter_of(name)].append(name)
        if groups:
            layers[part] = [
                {"adapter": describe(adapter), "layers": names} for adapter, names in groups.items()
            ]
        chosen = _options(mounted)
        if chosen != Options():
            options[part] = dataclasses.asdict(chosen)
    described |= {LAYERS: layers} if layers else {}
    described |= {OPTIONS: options} if options else {}
    return {key: json.dumps(value) for key, value in described.items()}


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, _Part]:
    if OURS not in metadata:
        raise UserError(
            f"{path} has no {OURS!r} in its metadata: it was not written by lyco_lab; "
            "formats.foreign reads files of other programs"
        )
    sections = _object(path, metadata, OURS)
    layers = _object(path, metadata, LAYERS)
    options = _object(path, metadata, OPTIONS)
    return {
        part: _Part(
            _build(path, section),
            _others(path, layers.get(part, [])),
            _chosen(path, options.get(part, {})),
        )
        for part, section in sections.items()
    }


def _object(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """What the metadata hold under a key: an object of JSON, by parts of the model."""
    try:
        found = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"its metadata {key!r} are not JSON ({error})") from error
    if not isinstance(found, dict):
        raise Damaged(path, f"its metadata {key!r} are {found!r:.40}, and an object is needed")
    return found


def _others(path: Path, groups: Any) -> dict[str, Adapter]:
    """Layer -> its adapter, for the layers that do not have that of their part."""
    found: dict[str, Adapter] = {}
    for group in groups if isinstance(groups, list) else [groups]:
        names = group.get("layers") if isinstance(group, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Damaged(
                path,
                f"its metadata {LAYERS!r} hold {group!r:.60}, and an adapter and a list of the "
                "names of its layers are needed",
            )
        found |= dict.fromkeys(names, _build(path, group.get("adapter")))
    return found


def _chosen(path: Path, section: Any) -> Options:
    known = {field.name: field.type for field in dataclasses.fields(Options)}
    if not isinstance(section, dict) or not section.keys() <= known.keys():
        raise Damaged(
            path,
            f"its metadata {OPTIONS!r} hold {section!r:.60}, and a value of each of "
            f"{', '.join(known)} is needed",
        )
    for key, value in section.items():
        check_type(f"{path}: {OPTIONS}.{key}", value, known[key])
    try:
        return Options(**section)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _build(path: Path, section: Any) -> Adapter:
    if not isinstance(section, dict):
        raise Damaged(path, f"its metadata hold the adapter {section!r:.60}, no object")
    kind = section.get("kind")
    if isinstance(kind, str) and is_path(kind) and kind.rpartition(".")[0] not in sys.modules:
        # A file may come from anywhere, and importing runs code.
        raise UserError(
            f"{path} holds an adapter {kind!r}, which is not of lyco_lab: import "
            f"{kind.rpartition('.')[0]} first, if you trust it"
        )
    if not isinstance(kind, str) or (kind not in ADAPTERS and not is_path(kind)):
        raise UserError(f"{path} holds an unknown adapter {kind!r}{nearest(str(kind), ADAPTERS)}")
    try:
        return build(section)
    except UserError as error:
        raise UserError(f"{path}: its {kind} was written with other fields: {error}") from error


def _options(mounted: Mounted) -> Options:
    return mounted.options_of(next(iter(mounted.layers)))


def _standard(parts: Mapping[str, Mounted]) -> dict[str, str]:
    """The least that readers of the layout look for."""
    mounted = next(iter(parts.values()))
    outer, adapter, options = mounted.adapter, mounted.adapter.inner, _options(mounted)
    fields = {ARGUMENTS.get(key, key): value for key, value in describe(adapter).items()}
    del fields["kind"]
    arguments: dict[str, Any] = {"algo": adapter.file_algo}
    if "rank" not in fields:
        fields["alpha"] = 1.0  # what it is here is in the tensors
    rank, alpha = fields.pop("rank", 1), fields.pop("alpha")
    if "conv_rank" in fields:
        conv_rank, conv_alpha = fields.pop("conv_rank"), fields.pop("conv_alpha")
        arguments["conv_dim"] = rank if conv_rank is None else conv_rank
        arguments["conv_alpha"] = alpha if conv_alpha is None else conv_alpha
    if outer is not adapter:
        arguments |= {"dora_wd": True, "wd_on_output": describe(outer).get("axis", "out") == "out"}
    if options != Options():
        fields |= dataclasses.asdict(options)
    if any(mounted.adapter_of(name).takes != adapter.takes for name in mounted.layers):
        arguments["train_norm"] = True
    return {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps({**arguments, **fields}),
    }


def _in_order(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: the library writes them in any order."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]
