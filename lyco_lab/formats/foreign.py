"""Adapter files in the layout of `kohya.py` that other programs wrote, without our metadata.

    mounted, report = apply(path, {"unet": unet, "text_encoder": encoder})

What an adapter is, each layer's tensors tell: the algorithm by a tensor that only it has, rank and
blocks by their shapes, never by computing again how a program may have split a weight. Every layer
has its own alpha; one without has gamma = 1. Where none of our adapters has tensors of such
shapes, the layer gets the difference of its weight as a whole, which is exactly equal.

One layer that cannot be read does not stop the others. The report says of every key of the file
what it was used as, or why it was not; if none was, that is an error.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from lyco_lab.adapters.base import Adapter, Factors, Shape
from lyco_lab.adapters.layers import BIAS, is_opaque, original, shape_of
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import Mounted, survey
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.norm import Norm
from lyco_lab.errors import UserError, nearest
from lyco_lab.formats import kohya
from lyco_lab.formats.kohya import ALPHA

# What a key may begin with, and the part of the model it then speaks of. Text encoders are written
# with and without `text_model`, as their classes have it, and numbered where a model has several.
PREFIXES = {
    "lora_unet_": "unet",
    "oft_unet_": "unet",
    "lycoris_": "unet",
    "lora_te_text_model_": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te1_text_model_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_text_model_": "text_encoder_2",
    "lora_te2_": "text_encoder_2",
}

Tensors = dict[str, Tensor]  # suffix -> tensor, of one layer


@dataclass(frozen=True)
class Line:
    """What became of one key of a file."""

    key: str
    used: bool
    note: str  # the adapter it belongs to, or why it was not used


@dataclass(frozen=True)
class Reading:
    """How the tensors of a layer were understood."""

    adapter: Adapter
    factors: Factors
    used: frozenset[str]  # suffixes
    note: str


def apply(path: Path, models: Mapping[str, nn.Module]) -> tuple[dict[str, Mounted], list[Line]]:
    """Mount what can be read of a file on the models, and say of every key whether it was used.

    A file of our own is read by its metadata, strictly. Nothing is changed if an error is raised.
    """
    path = Path(path)
    if kohya.OURS in kohya.read_metadata(path):
        mounted = kohya.apply(path, models)
        keys = safetensors.torch.load_file(path)
        return mounted, [Line(key, True, "by the file's metadata") for key in keys]
    index = {part: _stems(model) for part, model in models.items()}
    chosen: dict[str, dict[str, Reading]] = defaultdict(dict)
    report = []
    for layer, tensors in _layers(path).items():
        try:
            part, name = _find(layer, index)
            if name in chosen[part]:
                raise UserError(f"the layer {name!r} of the {part} has an adapter in this file")
            reading = interpret(tensors, models[part].get_submodule(name))
            survey(models[part], reading.adapter, [name])  # makes the checks of `attach`
        except UserError as error:
            report += [Line(f"{layer}.{suffix}", False, str(error)) for suffix in tensors]
            continue
        chosen[part][name] = reading
        for suffix in tensors:
            used = suffix in reading.used
            note = reading.note if used else f"it has no meaning beside {reading.note}"
            report.append(Line(f"{layer}.{suffix}", used, note))
    if not any(line.used for line in report):
        why = f": {report[0].key}: {report[0].note}" if report else ""
        raise UserError(f"{path}: none of its {len(report)} keys can be used{why}")
    return {part: _mount(models[part], layers) for part, layers in chosen.items() if layers}, report


def interpret(tensors: Mapping[str, Tensor], module: nn.Module) -> Reading:
    """The adapter and the factors that these tensors mean on a layer."""
    given = {_ALIASES.get(suffix, suffix): tensor for suffix, tensor in tensors.items()}
    marker = next((marker for marker in _READERS if marker in given), None)
    if marker is None:
        raise UserError(f"nothing is known that has the tensors {', '.join(sorted(given))}")
    given = {
        suffix: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        for suffix, tensor in given.items()
    }
    adapter = _READERS[marker](given, shape_of(module))
    try:
        reading = _fitted(adapter, given, module)
    except UserError as error:
        reading = _whole(adapter, given, module, str(error))
    names = {suffix for suffix in tensors if _ALIASES.get(suffix, suffix) in reading.used}
    return Reading(reading.adapter, reading.factors, frozenset(names), reading.note)


def _fitted(adapter: Adapter, given: Tensors, module: nn.Module) -> Reading:
    """As this adapter, if it has tensors of these shapes on such a layer."""
    if _OFFSET in given and not adapter.trains_bias():
        raise UserError(f"an offset of the bias is nothing that {adapter} trains")
    wanted = kohya.layout(adapter, module)
    own = {suffix: tensor for suffix, tensor in given.items() if suffix in wanted}
    offset = kohya.bias_suffix(adapter)
    if offset in wanted and offset not in own:
        own[offset] = torch.zeros(wanted[offset])
    factors = kohya.read("the file", adapter, own, module)
    return Reading(adapter, factors, frozenset({*own, ALPHA} & given.keys()), str(adapter))


def _whole(adapter: Adapter, given: Tensors, module: nn.Module, why: str) -> Reading:
    """As the difference W' - W that the adapter defines, where it refuses such a layer."""
    shape, bias = shape_of(module), original(module).bias
    wanted = {name: size for name, size in kohya.layout(adapter, module).items() if name != _OFFSET}
    own = {suffix: tensor for suffix, tensor in given.items() if suffix in wanted}
    if any(
        suffix not in own or own[suffix].numel() != math.prod(wanted[suffix]) for suffix in wanted
    ):
        raise UserError(why)
    fitting = {suffix: tensor.reshape(wanted[suffix]) for suffix, tensor in own.items()}
    factors = {"diff": adapter.delta(_weight(module), adapter.from_file(shape, fitting))}
    used = {*own, ALPHA} & given.keys()
    if _OFFSET in given:
        if bias is None or bias.numel() != given[_OFFSET].numel():
            raise UserError(f"{_OFFSET!r} does not fit the layer's bias")
        factors[BIAS] = given[_OFFSET].reshape(bias.shape)
        used.add(_OFFSET)
    whole = Native(bias=BIAS in factors)
    return Reading(whole, factors, frozenset(used), f"the whole difference of the weight: {why}")


def _weight(module: nn.Module) -> Tensor:
    if is_opaque(module):
        return torch.empty((), device="meta").expand(shape_of(module))
    weight = original(module).weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()


def _mount(model: nn.Module, layers: Mapping[str, Reading]) -> Mounted:
    counted = Counter(reading.adapter for reading in layers.values())
    chosen = {name: reading.adapter for name, reading in layers.items()}
    state = {
        f"{name}.{key}": factor
        for name, reading in layers.items()
        for key, factor in reading.factors.items()
    }
    return kohya.mount(model, counted.most_common(1)[0][0], chosen, state)


def _layers(path: Path) -> dict[str, Tensors]:
    layers: dict[str, Tensors] = defaultdict(dict)
    for key, tensor in safetensors.torch.load_file(path).items():
        layer, _, suffix = key.partition(".")
        layers[layer][suffix] = tensor
    return dict(layers)


def _stems(model: nn.Module) -> dict[str, list[str]]:
    """Layers by their names with '_' for '.', which need not tell them apart."""
    stems = defaultdict(list)
    for name in kohya.adaptable(model):
        stems[name.removeprefix("text_model.").replace(".", "_")].append(name)
    return dict(stems)


def _find(layer: str, index: Mapping[str, Mapping[str, list[str]]]) -> tuple[str, str]:
    fitting = [prefix for prefix in PREFIXES if layer.startswith(prefix)]
    if not fitting:
        raise UserError(f"keys are read that begin with one of {', '.join(PREFIXES)}")
    prefix = max(fitting, key=len)
    part, stem = PREFIXES[prefix], layer.removeprefix(prefix)
    if part not in index:
        raise UserError(f"no {part} was given")
    names = index[part].get(stem, [])
    if not names:
        raise UserError(f"the {part} has no layer {stem!r}{nearest(stem, index[part])}")
    if len(names) > 1:
        raise UserError(f"{stem!r} may be any of {', '.join(names)}")
    return part, names[0]


# From the tensors of a layer to the adapter that has them.


def _rank(given: Tensors, suffix: str, axis: int = 0) -> int:
    if suffix not in given:
        raise UserError(f"it lacks {suffix!r} beside {', '.join(sorted(given))}")
    return given[suffix].shape[axis]


def _scale(given: Tensors, rank: int) -> float:
    """The alpha with which gamma = alpha / rank; without one, gamma is 1."""
    if ALPHA not in given:
        return float(rank)
    alpha = float(given[ALPHA])
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"its alpha is {alpha}, needs a finite number > 0")
    return alpha


def _lora(given: Tensors, shape: Shape) -> Adapter:
    rank = _rank(given, "lora_down.weight")
    return LoRA(rank=rank, alpha=_scale(given, rank), tucker="lora_mid.weight" in given)


def _loha(given: Tensors, shape: Shape) -> Adapter:
    rank = _rank(given, "hada_w1_b")
    return LoHa(rank=rank, alpha=_scale(given, rank))


def _full(given: Tensors, shape: Shape) -> Adapter:
    return Native(bias=_OFFSET in given)


def _norm(given: Tensors, shape: Shape) -> Adapter:
    return Norm()


_OFFSET = "diff_b"
_ALIASES = {"oft_diag": "oft_blocks"}

_READERS: dict[str, Callable[[Tensors, Shape], Adapter]] = {
    "lora_up.weight": _lora,
    "hada_w1_a": _loha,
    "diff": _full,
    "w_norm": _norm,
}
