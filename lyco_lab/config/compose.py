"""Defaults <- base.yaml <- study.yaml <- command line, one layer at a time.

Each layer is a nested mapping that knows where it came from, so an error can say so. Layers merge
key by key and lists are replaced; a layer that changes the kind of adapter or of optimizer replaces
that whole section, since the fields of the former kind mean nothing to the new one.
"""

import functools
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lyco_lab import adapters, optimizers
from lyco_lab.config.asked import Asked
from lyco_lab.config.groups import Group
from lyco_lab.config.run import DEFAULT_ADAPTER, DEFAULT_OPTIMIZER, Run
from lyco_lab.config.training import Plugin
from lyco_lab.errors import UserError, nearest
from lyco_lab.kinds import Family

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
# Settings that are lists of mappings.
ENTRIES: dict[Any, type] = {
    tuple[Group, ...]: Group,
    tuple[Asked, ...]: Asked,
    tuple[Plugin, ...]: Plugin,
}
INNER_KEYS = tuple(  # of the things that things hold
    f"{name}.{spec.name}.{key}"
    for name, family in FAMILIES.items()
    for cls in family.kinds.values()
    for spec in fields(cls)
    if family.holds(cls, spec.name)
    for key in sorted(FAMILY_KEYS[name])
)


@dataclass(frozen=True)
class Layer:
    origin: str  # "experiments/base.yaml", "the command line"
    values: Nested


@dataclass(frozen=True)
class _Top:
    """The settings of a run that are in no section, for OmegaConf to type."""

    seed: int = 0


def read_yaml(path: Path) -> Nested:
    """A YAML file that holds a mapping."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} needs keys and values at its top level, found {values!r}")
    return {str(key): value for key, value in values.items()}


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """["train.lr=1e-3"] -> {"train.lr": 0.001}, with YAML's reading of the value."""
    overrides: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not a setting: write key=value, as in train.lr=1e-3")
        if key in overrides:
            raise UserError(f"{key} is given twice on the command line")
        try:
            overrides[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
            overrides[key] = overrides[key]["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{word!r} on the command line: {_one_line(error)}") from error
    return overrides


def nest(flat: Mapping[Any, Any], origin: str) -> Nested:
    """{"train.lr": 1, "train": {"steps": 2}} -> {"train": {"lr": 1, "steps": 2}}."""
    nested: Nested = {}
    for dotted, value in flat.items():
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
    # Settings of an adapter or optimizer that were given without its kind, and where.
    loose: dict[str, dict[str, str]] = {name: {} for name in FAMILIES}
    for layer in layers:
        values = nest(layer.values, layer.origin)
        if not values:
            continue
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
        known = (repr(merged), layer.origin)
        if known not in memory:
            memory[known] = _typed(merged, layer.origin)
        typed = dict(memory[known])
    sections = {key: cls(**typed.pop(key, {})) for key, cls in SECTIONS.items()}
    return Run(name=name, study=study, **sections, **typed)


def check_keys(values: Nested, origin: str) -> None:
    """Every key exists. Which of them suits the adapter's kind is known only after merging."""
    for key in (*SECTIONS, *FAMILIES):
        if key in values and not (isinstance(values[key], dict) and values[key]):
            raise UserError(f"{key} is {values[key]!r} in {origin}, needs keys of its own")
    for path in _paths(values):
        if path not in KEYS and path not in INNER_KEYS:
            raise UserError(f"unknown key {path!r} in {origin}{_hint(path)}")


def _hint(path: str) -> str:
    """The same name in the right section, or else whatever is spelled most like it."""
    same_name = [key for key in KEYS if key.split(".")[-1] == path.split(".")[-1]]
    near = nearest(path, same_name)
    if same_name and not near:
        near = f" (did you mean {same_name[0]!r}?)"
    return near or nearest(path, KEYS + INNER_KEYS)


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
    return str(section.get("kind", DEFAULTS[family]["kind"])).lower()


def _typed(merged: Nested, origin: str) -> Nested:
    """`merged` with its types checked and ${...} resolved; a wrong one names `origin`."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{_one_line(error)}, in {origin}") from error
    resolved = typing.cast(Nested, plain)
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
            raise UserError(f"{where}.{key} is {value!r} in {origin}, needs keys of its own")
        within[key] = _thing(family, value, origin, f"{where}.{key}")
    typed = _section(f"{where}.", options, cls, origin)
    return {"kind": cls.__name__.lower(), **within, **typed}


def _section(prefix: str, values: Nested, cls: type, origin: str) -> Nested:
    """`values` in the types of `cls`, one key at a time, so that an error can name its key."""
    schema = _schema(cls)
    hints = typing.get_type_hints(cls)
    typed: Nested = {}
    for key, value in values.items():
        if (entry := ENTRIES.get(hints[key])) is not None:
            typed[key] = _entries(f"{prefix}{key}", value, entry, origin)
            continue
        allowed = _alternatives(hints[key])
        wrong = UserError(f"{prefix}{key} is {value!r} in {origin}, needs {_words(allowed)}")
        # OmegaConf would turn numbers into text and 1 into true. YAML reads a bare `no` or `on`
        # as a truth value and 12:30 as a number, so converting would hide a mistake.
        for exact in (str, bool):
            if exact in allowed and value is not None and not isinstance(value, exact):
                raise wrong
        try:
            given = tuple(value) if isinstance(value, list) else value
            OmegaConf.update(schema, key, given, merge=False)  # the schema serves again
        except (OmegaConfBaseException, TypeError) as error:
            raise wrong from error
        found = schema[key]
        if OmegaConf.is_config(found):
            found = OmegaConf.to_container(found)
        typed[key] = tuple(found) if isinstance(value, list) else found
    return typed


def _entries(where: str, value: Any, cls: type, origin: str) -> tuple[Any, ...]:
    """A list of mappings as values of `cls`."""
    noun = "group" if cls is Group else "entry"
    if not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        nouns = {"group": "groups", "entry": "entries"}[noun]
        raise UserError(
            f"{where} is {value!r} in {origin}, needs a list of {nouns}, each with keys"
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
        found.append(cls(**_section(f"{where}[{number}].", entry, cls, origin)))
    return tuple(found)


@functools.cache
def _schema(cls: type) -> DictConfig:
    """`cls` as OmegaConf checks it; writable, since a value is checked by putting it there."""
    schema: DictConfig = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)
    return schema


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _words(allowed: tuple[Any, ...]) -> str:
    """Types in the user's words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {type(None): "null", tuple[float, float]: "a list of two numbers"}
    words |= {tuple[str, ...]: "a list of words", dict[str, float]: "names with numbers"}
    words |= {dict[str, Any]: "names with values"}
    return " or ".join(words.get(kind, str(kind)) for kind in allowed)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
