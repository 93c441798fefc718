"""Adapter files in the layout of `kohya.py` that other programs wrote, without our metadata.

    mounted, report = apply(path, {"unet": unet, "text_encoder": encoder})

What an adapter is, each layer's tensors tell: the algorithm by a tensor that only it has, rank and
blocks by their shapes, never by computing again how a program may have split a weight. Every layer
has its own alpha; one without has gamma = 1. Where none of our adapters has tensors of such
shapes, the layer gets the difference of its weight as a whole, which is exactly equal.

One layer that cannot be read does not stop the others. The report says of every key of the file
what it was used as, or why it was not. A part of the model of which the file has keys and none can
be used is an error, as half an adapter makes images that look like results; `partial=True` allows
it. `oft_diag`, the rotations of LyCORIS 2.0, is refused: there the tensor holds the finished
rotation, and in later versions the generator.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.adapted_layer import is_opaque, shape_of
from lyco_lab.adapters.base import Adapter, Additive
from lyco_lab.adapters.boft import BOFT
from lyco_lab.adapters.dora import MAGNITUDE, DoRA
from lyco_lab.adapters.glora import GLoRA
from lyco_lab.adapters.ia3 import IA3
from lyco_lab.adapters.layer_adapter import BIAS
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.merging import original
from lyco_lab.adapters.mount import Mounted, survey
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.norm import Norm
from lyco_lab.adapters.oft import OFT
from lyco_lab.adapters.rotation import Rotation
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.errors import UserError, nearest
from lyco_lab.formats import kohya
from lyco_lab.formats.kohya import ALPHA
from lyco_lab.linalg import kron
from lyco_lab.readers import read_safetensors

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
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
}
OTHERS = "keys of no known part"
HINTS = 3  # unknown layers for which the nearest name is looked up, which takes long in a model

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


def apply(
    path: Path, models: Mapping[str, nn.Module], *, partial: bool = False
) -> tuple[dict[str, Mounted], list[Line]]:
    """Mount what can be read of a file on the models, and say of every key whether it was used.

    A file of our own is read by its metadata, strictly. Nothing is changed if an error is raised.

    Raises `UserError` if no key can be used, and unless `partial`, if a part of the model has keys
    in the file and none of them can be.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    if kohya.OURS in metadata:
        mounted = kohya.apply(path, models, partial=partial)
        return mounted, [_ours(key, mounted) for key in tensors]
    kohya.check_content(path, tensors, metadata)
    old = next((key for key in tensors if key.endswith(f".{_FINISHED}")), None)
    if old is not None:
        raise UserError(f"{path} holds {old!r}: {_REFUSED}")
    index = {part: _stems(model) for part, model in models.items()}
    chosen: dict[str, dict[str, Reading]] = defaultdict(dict)
    report: list[Line] = []
    hints = _Hints()
    for layer, given in _layers(tensors).items():
        try:
            part, name = _find(layer, index, hints)
            if name in chosen[part]:
                raise UserError(f"the layer {name!r} of the {part} has an adapter in this file")
            reading = interpret(given, models[part].get_submodule(name))
            survey(models[part], reading.adapter, [name])  # makes the checks of `attach`
        except (ValueError, RuntimeError, LookupError, TypeError) as error:
            # Of shapes that do not fit, too.
            note = " ".join(str(error).split())
            report += [Line(_key(layer, suffix), False, note) for suffix in given]
            continue
        chosen[part][name] = reading
        for suffix in given:
            used = suffix in reading.used
            note = reading.note if used else f"it has no meaning beside {reading.note}"
            report.append(Line(_key(layer, suffix), used, note))
    _check_parts(path, report, partial)
    return {part: _mount(models[part], layers) for part, layers in chosen.items() if layers}, report


def _ours(key: str, mounted: Mapping[str, Mounted]) -> Line:
    part = kohya.part_of(key)
    used = part in mounted
    return Line(key, used, "by the file's metadata" if used else f"no {part} was given")


def _key(layer: str, suffix: str) -> str:
    return f"{layer}.{suffix}" if suffix else layer


def _check_parts(path: Path, report: list[Line], partial: bool) -> None:
    """Raise an error if nothing was used, or nothing of a part."""
    if not any(line.used for line in report):
        why = f": {report[0].key}: {report[0].note}" if report else ""
        raise UserError(f"{path}: none of its {len(report)} keys can be used{why}")
    parts: dict[str, list[Line]] = defaultdict(list)
    for line in report:
        prefix = _prefix(line.key)
        parts[f"{PREFIXES[prefix]} keys" if prefix else OTHERS].append(line)
    for part, lines in parts.items():
        if not partial and not any(line.used for line in lines):
            raise UserError(
                f"{path}: none of its {len(lines)} {part} can be used, of {len(report)} in all: "
                f"{lines[0].key}: {lines[0].note}; partial=True applies the rest without them"
            )


class _Hints:
    """The nearest name for the first few that are unknown."""

    def __init__(self) -> None:
        self.left = HINTS

    def __call__(self, word: str, candidates: Iterable[str]) -> str:
        self.left -= 1
        return nearest(word, candidates) if self.left >= 0 else ""


def interpret(tensors: Mapping[str, Tensor], module: nn.Module) -> Reading:
    """The adapter and the factors that these tensors mean on a layer."""
    marker = next((marker for marker in _READERS if marker in tensors), None)
    if marker is None:
        raise UserError(f"nothing is known that has the tensors {', '.join(sorted(tensors))}")
    given = {suffix: _widened(suffix, tensor) for suffix, tensor in tensors.items()}
    magnitude = given.pop(_MAGNITUDE, None)
    adapter = _READERS[marker](given, shape_of(module))
    try:
        reading = _fitted(adapter, given, module)
    except UserError as error:
        reading = _whole(marker, adapter, given, module, str(error))
    if magnitude is not None and isinstance(reading.adapter, Additive):
        reading = _decomposed(reading, magnitude, shape_of(module))
    return reading


def _widened(suffix: str, tensor: Tensor) -> Tensor:
    """In float32 at least."""
    if suffix == kohya.CHOICE:
        return tensor
    if suffix == ALPHA:
        return tensor.float()
    if not tensor.is_floating_point():
        raise UserError(f"{suffix!r} holds {tensor.dtype}, needs floating-point numbers")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _decomposed(reading: Reading, magnitude: Tensor, shape: Shape) -> Reading:
    """With a magnitude for each output, or for each input where it is 1 x Q."""
    outputs = magnitude.numel() == shape[0] and magnitude.shape[0] == shape[0]
    if not outputs and magnitude.numel() != shape[1]:
        raise UserError(
            f"{_MAGNITUDE!r} has shape {tuple(magnitude.shape)}, needs an entry for each of the "
            f"{shape[0]} outputs or 1 x {shape[1]} inputs"
        )
    adapter = DoRA(of=reading.adapter, axis="out" if outputs else "in")
    size = adapter.factor_shapes(shape)[MAGNITUDE]
    factors = {**reading.factors, MAGNITUDE: magnitude.reshape(size)}
    return Reading(adapter, factors, reading.used | {_MAGNITUDE}, f"DoRA over {reading.note}")


def _fitted(adapter: Adapter, given: Tensors, module: nn.Module) -> Reading:
    """As this adapter, if it has tensors of these shapes on such a layer."""
    if _OFFSET in given and not adapter.trains_bias():
        raise UserError(f"an offset of the bias is nothing that {adapter} trains")
    wanted = kohya.layout(adapter, module)
    # A tensor of another name that adapters have would not be there for nothing.
    own = {key: tensor for key, tensor in given.items() if key in wanted or key in _KNOWN}
    offset = kohya.bias_suffix(adapter)
    if offset in wanted and offset not in own:
        own[offset] = torch.zeros(wanted[offset])
    factors = kohya.read("the file", adapter, own, module)
    used = own.keys() | ({ALPHA} if adapter.file_alpha(shape_of(module)) is not None else set())
    return Reading(adapter, factors, frozenset(used & given.keys()), str(adapter))


def _whole(marker: str, adapter: Adapter, given: Tensors, module: nn.Module, why: str) -> Reading:
    """As the difference W' - W that the tensors define, where no adapter takes such a layer."""
    weight = _weight(module)
    rest = set(given) - {_OFFSET}
    if marker in _DELTAS:
        delta = _DELTAS[marker](given, weight)
    else:
        wanted = _layout(adapter, module)
        other = wanted.keys() ^ (given.keys() & (_KNOWN | wanted.keys()))
        if other or any(given[key].numel() != math.prod(wanted[key]) for key in wanted):
            raise UserError(why)
        fitting = {key: given[key].reshape(size) for key, size in wanted.items()}
        delta = adapter.delta(weight, adapter.from_file(tuple(weight.shape), fitting))
        rest &= {*wanted, ALPHA}
    if delta.shape != weight.shape:
        raise UserError(f"its update is {tuple(delta.shape)}, the weight {tuple(weight.shape)}")
    factors, offset, bias = {"diff": delta}, given.get(_OFFSET), original(module).bias
    if offset is not None:
        if bias is None or bias.numel() != offset.numel():
            raise UserError(f"{_OFFSET!r} has {offset.numel()} entries, the layer no such bias")
        factors[BIAS] = offset.reshape(bias.shape)
        rest.add(_OFFSET)
    note = f"the whole difference of the weight: {why}"
    return Reading(Native(bias=offset is not None), factors, frozenset(rest), note)


def _layout(adapter: Adapter, module: nn.Module) -> dict[str, Shape]:
    """Without an offset of the bias."""
    layout = kohya.layout(adapter, module)
    layout.pop(kohya.bias_suffix(adapter), None)
    return layout


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


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    layers: dict[str, Tensors] = defaultdict(dict)
    for key, tensor in tensors.items():
        layer, _, suffix = key.partition(".")
        layers[layer][suffix] = tensor
    return dict(layers)


def _stems(model: nn.Module) -> dict[str, list[str]]:
    """Layers by their names with '_' for '.', which need not tell them apart."""
    stems = defaultdict(list)
    for name in kohya.adaptable(model):
        stems[name.removeprefix("text_model.").replace(".", "_")].append(name)
    return dict(stems)


def _prefix(key: str) -> str | None:
    return max((prefix for prefix in PREFIXES if key.startswith(prefix)), key=len, default=None)


def _find(
    layer: str, index: Mapping[str, Mapping[str, list[str]]], hints: _Hints
) -> tuple[str, str]:
    prefix = _prefix(layer)
    if prefix is None:
        raise UserError(f"keys are read that begin with one of {', '.join(PREFIXES)}")
    part, stem = PREFIXES[prefix], layer.removeprefix(prefix)
    if part not in index:
        raise UserError(f"no {part} was given")
    names = index[part].get(stem, [])
    if not names:
        raise UserError(f"the {part} has no layer {stem!r}{hints(stem, index[part])}")
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
    return LoHa(rank=rank, alpha=_scale(given, rank), tucker="hada_t1" in given)


def _lokr(given: Tensors, shape: Shape) -> Adapter:
    sizes = {key: tensor.to("meta") for key, tensor in given.items()}  # a product may be huge
    (U, S), (V, _) = _left(sizes).shape, _right(sizes).shape[:2]
    rank = _lokr_rank(given)
    return LoKr(
        rank=LoKr.rank if rank is None else rank,
        alpha=LoKr.alpha if rank is None else _scale(given, rank),
        factor=max(min(U, V), S, 2),
        full_matrix=rank is None,
        decompose_both="lokr_w1" not in given,
        tucker="lokr_t2" in given,
        unbalanced=U > V,
    )


def _lokr_delta(given: Tensors, weight: Tensor) -> Tensor:
    rank = _lokr_rank(given)
    gamma = 1.0 if rank is None else _scale(given, rank) / rank
    sizes = {key: tensor.to("meta") for key, tensor in given.items()}
    entries = _left(sizes).numel() * _right(sizes).numel()
    if entries != weight.numel():
        raise UserError(f"its blocks make {entries} entries, the weight has {weight.numel()}")
    right = _right(given)
    if right.dim() == 2:
        right = right.reshape(len(right), -1, *weight.shape[2:])
    return gamma * kron(_left(given), right)


def _lokr_rank(given: Tensors) -> int | None:
    """Of the factored blocks; None where both are full, and alpha has no meaning."""
    ranks = {given[key].shape[0] for key in ("lokr_w1_b", "lokr_w2_b") if key in given}
    if len(ranks) > 1:
        raise UserError(f"its blocks are of ranks {sorted(ranks)}, which cannot share an alpha")
    return ranks.pop() if ranks else None


def _left(given: Tensors) -> Tensor:
    if "lokr_w1" in given:
        return given["lokr_w1"]
    _rank(given, "lokr_w1_b")
    return given["lokr_w1_a"] @ given["lokr_w1_b"]


def _right(given: Tensors) -> Tensor:
    """The right block; unrolled where it is factored without a core."""
    if "lokr_w2" in given:
        return given["lokr_w2"]
    _rank(given, "lokr_w2_a"), _rank(given, "lokr_w2_b")
    a, b = given["lokr_w2_a"], given["lokr_w2_b"]
    if "lokr_t2" not in given:
        return a @ b.flatten(1)
    return torch.einsum("rs...,rv,st->vt...", given["lokr_t2"], a, b)


def _rotation(given: Tensors, shape: Shape) -> Rotation:
    blocks = given["oft_blocks"]
    kinds: dict[int, type[Rotation]] = {3: OFT, 4: BOFT}
    if blocks.dim() not in kinds:
        raise UserError(f"'oft_blocks' has {blocks.dim()} axes, needs 3 (OFT) or 4 (BOFT)")
    constraint = float(given.get(ALPHA, 0.0))
    rescaled = "rescale" in given
    return kinds[blocks.dim()](blocks.shape[-1], constraint=constraint, rescaled=rescaled)


def _finished(given: Tensors, shape: Shape) -> Adapter:
    raise UserError(f"it has {_FINISHED!r}: {_REFUSED}")


def _rotation_delta(given: Tensors, weight: Tensor) -> Tensor:
    """For blocks of another number, which OFT takes as they are."""
    adapter, blocks = _rotation(given, tuple(weight.shape)), given["oft_blocks"]
    if not isinstance(adapter, OFT) or blocks.shape[0] * blocks.shape[1] != weight.shape[0]:
        raise UserError(f"blocks of {tuple(blocks.shape)} do not rotate {weight.shape[0]} outputs")
    factors = {"blocks": blocks}
    if "rescale" in given:
        factors["scale"] = given["rescale"].reshape(-1, *[1] * (weight.dim() - 1)) - 1
    return adapter.delta(weight, factors)


def _glora(given: Tensors, shape: Shape) -> Adapter:
    if {"b1.weight", "a2.weight", "b2.weight"} - given.keys():
        raise UserError(f"GLoRA has a1, a2, b1 and b2, the file {', '.join(sorted(given))}")
    sides = (given["a1.weight"].shape[0], given["b1.weight"].shape[0])
    if sides != (shape[1], shape[0]):  # before LyCORIS 3 the two of each pair had changed places
        for one in ("a", "b"):
            first, second = f"{one}1.weight", f"{one}2.weight"
            given[first], given[second] = given[second], given[first]
    rank = given["a2.weight"].shape[0]
    return GLoRA(rank=rank, alpha=_scale(given, rank))


def _ia3(given: Tensors, shape: Shape) -> Adapter:
    return IA3(on_input=bool(given["on_input"]))


def _tlora(given: Tensors, shape: Shape) -> Adapter:
    raise UserError(
        "T-LoRA subtracts the singular vectors that it started from, and LyCORIS does not write "
        "which these were"
    )


def _full(given: Tensors, shape: Shape) -> Adapter:
    return Native(bias=_OFFSET in given)


def _norm(given: Tensors, shape: Shape) -> Adapter:
    return Norm()


_OFFSET = "diff_b"
_MAGNITUDE = "dora_scale"
_FINISHED = "oft_diag"
_REFUSED = (
    "LyCORIS 2.0 wrote the finished rotation under that name, and this program reads generators "
    "('oft_blocks'); train it again with LyCORIS 3, or merge it into the model with LyCORIS 2.0"
)

_READERS: dict[str, Callable[[Tensors, Shape], Adapter]] = {
    "lora_up.weight": _lora,
    "hada_w1_a": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "on_input": _ia3,
    "diff": _full,
    "w_norm": _norm,
    "oft_blocks": _rotation,
    _FINISHED: _finished,
    "a1.weight": _glora,
    "lambda_layer": _tlora,
}

_KNOWN = {
    suffix
    for cls in ADAPTERS.values()
    if isinstance(cls.file_names, Mapping)  # not of one that takes them from another
    for suffix in cls.file_names.values()
}

# W' - W by definition, where tensors can have shapes that none of our adapters would choose.
_DELTAS: dict[str, Callable[[Tensors, Tensor], Tensor]] = {
    "lokr_w1": _lokr_delta,
    "lokr_w1_a": _lokr_delta,
    "oft_blocks": _rotation_delta,
}
