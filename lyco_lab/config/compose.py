"""Defaults <- base.yaml <- study.yaml <- command line, one layer at a time.

Each layer is a nested mapping that knows where it came from, so an error can say so. Layers merge
key by key and lists are replaced; a layer that changes the kind of adapter or of optimizer replaces
that whole section, since the fields of the former kind mean nothing to the new one.
"""

import functools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from lyco_lab import adapters, optimizers, settings
from lyco_lab.config import values as reading
from lyco_lab.config.asked import Asked
from lyco_lab.config.groups import Group
from lyco_lab.config.run import DEFAULT_ADAPTER, DEFAULT_OPTIMIZER, Run
from lyco_lab.config.training import Plugin
from lyco_lab.errors import UserError, nearest
from lyco_lab.kinds import Family
from lyco_lab.settings import shown
from lyco_lab.user_classes import is_path

Nested = dict[str, Any]
SECTIONS: dict[str, type] = {
    spec.name: typing.cast(type, spec.type) for spec in fields(Run) if is_dataclass(spec.type)
}
# The sections that hold a kind and its fields.
FAMILIES: dict[str, Family[Any]] = {"adapter": adapters.FAMILY, "optimizer": optimizers.FAMILY}
DEFAULTS: dict[str, Nested] = {"adapter": DEFAULT_ADAPTER, "optimizer": DEFAULT_OPTIMIZER}
FAMILY_KEYS = {
    name: {"kind", *(spec.name for cls in family.kinds.values() for spec in fields(cls))}
    for name, family in FAMILIES.items()
}
KEYS = (
    "seed",
    *(f"{name}.{spec.name}" for name, cls in SECTIONS.items() for spec in fields(cls)),
    *(f"{name}.{key}" for name, keys in FAMILY_KEYS.items() for key in sorted(keys)),
)
# What other programs call a setting.
ELSEWHERE = {
    "learning_rate": "train.lr", "unet_lr": "train.lr", "text_lr": "train.text_encoder_lr",
    "max_train_steps": "train.steps", "num_steps": "train.steps", "iterations": "train.steps",
    "epochs": "train.steps", "max_train_epochs": "train.steps", "num_epochs": "train.steps",
    "train_batch_size": "train.batch_size", "gradient_accumulation_steps": "train.accumulate",
    "lr_scheduler": "train.schedule", "scheduler": "train.schedule",
    "warmup": "train.warmup_steps", "lr_warmup_steps": "train.warmup_steps",
    "max_grad_norm": "train.grad_clip", "gradient_clip_val": "train.grad_clip",
    "loss_type": "train.loss", "huber_c": "train.huber_delta",
    "ip_noise_gamma": "train.input_perturbation", "save_every_n_steps": "train.checkpoint_every",
    "network_dim": "adapter.rank", "lora_rank": "adapter.rank", "dim": "adapter.rank",
    "network_alpha": "adapter.alpha", "lora_alpha": "adapter.alpha", "algo": "adapter.kind",
    "optimizer_type": "optimizer.kind", "num_repeats": "data.repeats",
    "train_data_dir": "data.folder", "image_dir": "data.folder", "dataset_config": "data.toml",
    "flip_aug": "data.flip", "shuffle_caption": "data.shuffle_tags", "keep_tokens":
    "data.keep_tags", "mixed_precision": "model.precision", "num_inference_steps": "generate.steps",
    "guidance_scale": "generate.guidance", "cfg_scale": "generate.guidance",
    "pretrained_model_name_or_path": "model.path",
}  # fmt: skip
# Settings that are lists of mappings.
ENTRIES: dict[Any, type] = {
    tuple[Group, ...]: Group,
    tuple[Asked, ...]: Asked,
    tuple[Plugin, ...]: Plugin,
}
KIND = re.compile(rf"(?:^|\.)({'|'.join(FAMILIES)})\.(?:\w+\.)*kind$")


def _inner_keys(name: str, keys: Iterable[str]) -> list[str]:
    """The keys of the things that things of a family hold."""
    family = FAMILIES[name]
    held = [
        spec.name
        for cls in family.kinds.values()
        for spec in fields(cls)
        if family.holds(cls, spec.name)
    ]
    return [f"{name}.{field}.{key}" for field in held for key in sorted(keys)]


INNER_KEYS = tuple(key for name, keys in FAMILY_KEYS.items() for key in _inner_keys(name, keys))


@dataclass(frozen=True)
class Layer:
    origin: str  # "experiments/base.yaml", "the command line"
    values: Nested


@dataclass(frozen=True)
class _Top:
    """The settings of a run that are in no section."""

    seed: Annotated[int, settings.SEED] = 0


def read_yaml(path: Path) -> Nested:
    """A YAML file that holds a mapping."""
    values = reading.read(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} needs keys and values at its top level, found {shown(values)}")
    return {str(key): value for key, value in values.items()}


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """["train.lr=1e-3", "data.prefix=a photo of "] -> {"train.lr": 0.001, "data.prefix": ...}.

    Text is what stands behind `=`, as it is; numbers are decimal; lists and mappings are YAML.
    """
    overrides: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{shown(word)} is not a setting: write key=value, as in train.lr=1e-3")
        if key in overrides:
            raise UserError(f"{shown(key)[1:-1]} is given twice on the command line")
        try:
            overrides[key] = reading.spelled(text, _types_of(key))
        except ValueError as error:
            raise UserError(f"{shown(word)} on the command line: {error}") from error
    return overrides


@functools.cache
def _types_of(key: str) -> tuple[Any, ...]:
    """The types that a setting may have; () where there is none of that name."""
    first, _, rest = key.partition(".")
    if first in FAMILIES:
        name = rest.rpartition(".")[2]
        if name == "kind":
            return (str,)
        classes: list[type] = list(FAMILIES[first].kinds.values())
    else:
        name = rest if first in SECTIONS else key
        classes = [SECTIONS.get(first, _Top)]
    hints = [types[name] for cls in classes if name in (types := settings.types_of(cls))]
    return tuple(kind for hint in hints for kind in reading.alternatives(hint))


def nest(flat: Mapping[Any, Any], origin: str) -> Nested:
    """{"train.lr": 1, "train": {"steps": 2}} -> {"train": {"lr": 1, "steps": 2}}."""
    nested: Nested = {}
    for dotted, value in flat.items():
        if str(dotted).count(".") > reading.DEEPEST:
            raise UserError(f"unknown key {shown(dotted)} in {origin}")
        first, _, rest = str(dotted).partition(".")
        inner = {rest: value} if rest else value
        if isinstance(inner, Mapping):
            inner = nest(inner, origin)
        nested[first] = _join(nested[first], inner, first, origin) if first in nested else inner
    return nested


def _join(one: Any, other: Any, path: str, origin: str) -> Nested:
    """Two mappings without a key in common."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        raise UserError(f"{path} is given twice in {origin}")
    joined = one | other
    for key in one.keys() & other.keys():
        joined[key] = _join(one[key], other[key], f"{path}.{key}", origin)
    return joined


def build(
    name: str,
    study: str,
    layers: Iterable[Layer],
    memory: dict[tuple[str, str], Nested] | None = None,
) -> Run:
    """The run that results from `layers`, the last one winning.

    `memory`: of the runs of a study, which have most of their layers in common; what was checked
    for one is not checked again.
    """
    memory = {} if memory is None else memory
    merged: Nested = {}
    typed: Nested = {}
    origins: dict[str, str] = {}  # of each setting that is given
    # Settings of an adapter or optimizer that were given without its kind, and where.
    loose: dict[str, dict[str, str]] = {name: {} for name in FAMILIES}
    for layer in layers:
        values = nest(layer.values, layer.origin)
        if not values:
            continue
        learn_kinds(values, layer.origin)
        check_keys(values, layer.origin)
        for family, given in loose.items():
            section = values.get(family, {})
            if "kind" not in section:
                given |= dict.fromkeys(section, layer.origin)
            elif given and _kind(section, family) != _kind(merged.get(family, {}), family):
                key, origin = given.popitem()
                raise UserError(
                    f"{family}.{key} in {origin} would be lost, as {layer.origin} changes the kind "
                    f"to {section['kind']!r}: give it together with its kind"
                )
        merged = _merge(merged, values)
        origins |= dict.fromkeys(_paths(values), layer.origin)
        known = (repr(merged), layer.origin)
        if known not in memory:
            memory[known] = _typed(merged, layer.origin)
        typed = dict(memory[known])
    sections = {
        key: _traced(functools.partial(cls, **typed.pop(key, {})), origins, key)
        for key, cls in SECTIONS.items()
    }
    return _traced(functools.partial(Run, name=name, study=study, **sections, **typed), origins)


Made = TypeVar("Made")


def _traced(make: Callable[[], Made], origins: Mapping[str, str], section: str = "") -> Made:
    """What `make` returns; an error says where the settings that it names were given."""
    try:
        return make()
    except UserError as error:
        said = f"options.{error}" if section == "options" else str(error)  # which know no section
        family = said.split()[1] if said.startswith("the ") else said.partition(":")[0]
        within = f"{section or family}."
        named = [key for key in origins if _mentions(said, key)] or [
            key
            for key in origins
            if key.startswith(within) and _mentions(said, key.removeprefix(within))
        ]
        places = dict.fromkeys(origins[key] for key in named)
        if len(places) == 1:
            raise UserError(f"{said}, in {next(iter(places))}") from error
        if places:
            each = ", ".join(f"{key} in {origins[key]}" for key in named)
            raise UserError(f"{said}; given are {each}") from error
        raise UserError(said) from error


def _mentions(said: str, key: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w]|\.\w)", said) is not None


def check_keys(values: Nested, origin: str) -> None:
    """Every key exists. Which of them suits the adapter's kind is known only after merging."""
    for key in (*SECTIONS, *FAMILIES):
        if key in values and not (isinstance(values[key], dict) and values[key]):
            raise UserError(f"{key} is {shown(values[key])} in {origin}, needs keys of its own")
    for path in _paths(values):
        if not _is_key(path):
            raise UserError(f"unknown key {shown(path)} in {origin}{_hint(path)}")


def _hint(path: str) -> str:
    """The setting that another program calls so, the same name in the right section, or else
    whatever is spelled most like it, first in the section that was named."""
    section, _, name = path.rpartition(".")
    if len(path) > settings.SHOWN:
        return ""
    if name in ELSEWHERE:
        return f" (did you mean {ELSEWHERE[name]!r}?)"
    same_name = [key for key in KEYS if key.split(".")[-1] == name]
    near = nearest(path, same_name)
    if same_name and not near:
        near = f" (did you mean {same_name[0]!r}?)"
    own = [key for key in KEYS + INNER_KEYS if section and key.startswith(f"{section}.")]
    return near or nearest(path, own, least=0.8) or nearest(path, KEYS + INNER_KEYS)


def _paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _merge(below: Nested, above: Nested, family: str = "") -> Nested:
    merged = dict(below)
    for key, value in above.items():
        old, within = merged.get(key), family or (key if key in FAMILIES else "")
        if isinstance(old, dict) and isinstance(value, dict):
            changes_kind = "kind" in value and _kind(value, within) != _kind(old, within)
            value = value if changes_kind else _merge(old, value, within)
        merged[key] = value
    return merged


def _kind(section: Nested, family: str) -> str:
    kind = str(section.get("kind", DEFAULTS[family]["kind"]))
    return kind if is_path(kind) else kind.lower()


def learn_kinds(values: Mapping[str, Any], origin: str) -> None:
    """Import the classes that `adapter.kind` and `optimizer.kind` name by their paths.

    Only then is known which keys their sections have. Looks into every mapping and list, as those
    of `grid` and `runs`.
    """
    for key, value in values.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                learn_kinds({f"{key}.{name}": v for name, v in inner.items()}, origin)
            family = KIND.search(key)
            if family and isinstance(inner, str) and is_path(inner):
                try:
                    FAMILIES[family[1]].learn(inner, key[family.start(1) :])
                except UserError as error:
                    raise UserError(f"{error}, in {origin}") from error


@functools.lru_cache(maxsize=8)
def _learned(kinds: frozenset[tuple[str, str]]) -> frozenset[str]:
    """The keys of kinds that are not of this library, by the families and names of all kinds."""
    found = set()
    for name, family in FAMILIES.items():
        learned = [cls for word, cls in family.kinds.items() if is_path(word)]
        own = {spec.name for cls in learned for spec in fields(cls)}
        found |= {f"{name}.{key}" for key in own} | {*_inner_keys(name, FAMILY_KEYS[name] | own)}
    return frozenset(found)


def _is_key(path: str) -> bool:
    if path in KEYS or path in INNER_KEYS:
        return True
    return path in _learned(frozenset((n, word) for n, f in FAMILIES.items() for word in f.kinds))


def _typed(merged: Nested, origin: str) -> Nested:
    """`merged` with ${...} resolved and its values checked; a wrong one names `origin`."""
    resolved = reading.resolve(merged, origin)
    typed: Nested = {}
    for key, value in resolved.items():
        if key in FAMILIES:
            typed[key] = _thing(key, value, origin)
        elif key in SECTIONS:
            typed[key] = _section(f"{key}.", value, SECTIONS[key], origin)
        else:
            typed |= _section("", {key: value}, _Top, origin)
    return typed


def _thing(family: str, section: Nested, origin: str, where: str = "") -> Nested:
    """A section with a kind, in the types of that kind; `where` is what errors call it."""
    where = where or family
    section = {**DEFAULTS[family], **section}
    kinds = FAMILIES[family]
    try:
        cls = kinds.class_of(section, where)
    except UserError as error:
        raise UserError(f"{error}, in {origin}") from error
    options: Nested = {key: value for key, value in section.items() if key != "kind"}
    kinds.check_fields(cls, options, where, origin)
    within: Nested = {}
    for key in [key for key in options if kinds.holds(cls, key)]:
        value: Any = options.pop(key)
        if not (isinstance(value, dict) and value):
            raise UserError(f"{where}.{key} is {shown(value)} in {origin}, needs keys of its own")
        within[key] = _thing(family, value, origin, f"{where}.{key}")
    typed = _section(f"{where}.", options, cls, origin)
    return {"kind": kinds.word(cls), **within, **typed}


def _section(prefix: str, values: Nested, cls: type, origin: str) -> Nested:
    """`values` in the types of `cls`, one key at a time, so that an error can name its key."""
    hints = settings.types_of(cls)
    typed: Nested = {}
    for key, value in values.items():
        if (entry := ENTRIES.get(hints[key])) is not None:
            typed[key] = _entries(f"{prefix}{key}", value, entry, origin)
            continue
        where = f"{prefix}{key}"
        wrong = f"{where} is {shown(value)} in {origin}, needs {reading.words(hints[key])}"
        try:
            typed[key] = reading.convert(value, hints[key])
        except OverflowError:  # a whole number too large for any, which its range says
            typed[key] = value
        except TypeError as error:
            quoted = isinstance(value, bool | int | float) and str in reading.alternatives(
                hints[key]
            )
            raise UserError(wrong + ": put it in quotes" * quoted) from error
        try:
            settings.check_value(cls, key, where, value)
        except UserError as error:
            raise UserError(f"{error}, in {origin}") from error
    return typed


def _entries(where: str, value: Any, cls: type, origin: str) -> tuple[Any, ...]:
    """A list of mappings as values of `cls`."""
    noun = "group" if cls is Group else "entry"
    if not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        nouns = {"group": "groups", "entry": "entries"}[noun]
        raise UserError(
            f"{where} is {shown(value)} in {origin}, needs a list of {nouns}, each with keys"
        )
    known, found = [spec.name for spec in fields(cls)], []
    for number, entry in enumerate(value, start=1):
        for key in entry:
            if key not in known:
                takes = f"it takes {', '.join(known)}"
                raise UserError(
                    f"{noun} {number} of {where} in {origin} has no {key!r}; {takes}"
                    f"{nearest(str(key), known)}"
                )
        options = _section(f"{where}[{number}].", entry, cls, origin)
        try:
            found.append(cls(**options))
        except UserError as error:
            raise UserError(f"{error}, in {origin}") from error
    return tuple(found)
