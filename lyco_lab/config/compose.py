"""Defaults <- base.yaml <- study.yaml <- command line, one layer at a time.

Each layer is a nested mapping that knows where it came from, so an error can say so. Layers merge
key by key and lists are replaced; a layer that changes `adapter.kind` replaces the whole adapter
section, since the fields of the former kind mean nothing to the new one.
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

from lyco_lab import adapters
from lyco_lab.adapters import ADAPTERS
from lyco_lab.config.run import DEFAULT_ADAPTER, Run
from lyco_lab.errors import UserError, nearest

Nested = dict[str, Any]
SECTIONS: dict[str, type] = {
    spec.name: typing.cast(type, spec.type) for spec in fields(Run) if is_dataclass(spec.type)
}
ADAPTER_KEYS = {"kind", *(spec.name for cls in ADAPTERS.values() for spec in fields(cls))}
KEYS = (
    "seed",
    *(f"{name}.{spec.name}" for name, cls in SECTIONS.items() for spec in fields(cls)),
    *(f"adapter.{key}" for key in sorted(ADAPTER_KEYS)),
)
WRAPPING = {  # fields that hold an adapter of their own
    spec.name
    for cls in ADAPTERS.values()
    for spec in fields(cls)
    if adapters.FAMILY.holds(cls, spec.name)
}
INNER_KEYS = tuple(f"adapter.{name}.{key}" for name in WRAPPING for key in sorted(ADAPTER_KEYS))


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


def build(name: str, study: str, layers: Iterable[Layer]) -> Run:
    """The run that results from `layers`, the last one winning."""
    merged: Nested = {}
    typed: Nested = {}
    loose: dict[str, str] = {}  # adapter settings given without a kind, and where
    for layer in layers:
        values = nest(layer.values, layer.origin)
        check_keys(values, layer.origin)
        section = values.get("adapter", {})
        if "kind" not in section:
            loose |= dict.fromkeys(section, layer.origin)
        elif loose and _kind(section) != _kind(merged.get("adapter", {})):
            key, origin = loose.popitem()
            raise UserError(
                f"adapter.{key} in {origin} would be lost, as {layer.origin} changes the kind to "
                f"{section['kind']!r}: give it together with its kind"
            )
        merged = _merge(merged, values)
        typed = _typed(merged, layer.origin)
    sections = {key: cls(**typed.pop(key, {})) for key, cls in SECTIONS.items()}
    return Run(name=name, study=study, **sections, **typed)


def check_keys(values: Nested, origin: str) -> None:
    """Every key exists. Which of them suits the adapter's kind is known only after merging."""
    for key in (*SECTIONS, "adapter"):
        if key in values and not (isinstance(values[key], dict) and values[key]):
            raise UserError(f"{key} is {values[key]!r} in {origin}, needs keys of its own")
    for path in _paths(values):
        if path not in KEYS and path not in INNER_KEYS:
            raise UserError(f"unknown key {path!r} in {origin}{_hint(path)}")


def _hint(path: str) -> str:
    """The same name in the right section, or else whatever is spelled most like it."""
    same_name = [key for key in KEYS if key.split(".")[-1] == path.split(".")[-1]]
    if len(same_name) == 1:
        return f" (did you mean {same_name[0]!r}?)"
    return nearest(path, same_name) or nearest(path, KEYS + INNER_KEYS)


def _paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _merge(below: Nested, above: Nested) -> Nested:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            changes_kind = "kind" in value and _kind(value) != _kind(old)
            value = value if changes_kind else _merge(old, value)
        merged[key] = value
    return merged


def _kind(section: Nested) -> str:
    return str(section.get("kind", DEFAULT_ADAPTER["kind"])).lower()


def _typed(merged: Nested, origin: str) -> Nested:
    """`merged` with its types checked and ${...} resolved; a wrong one names `origin`."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{_one_line(error)}, in {origin}") from error
    resolved = typing.cast(Nested, plain)
    typed: Nested = {}
    for key, value in resolved.items():
        if key == "adapter":
            typed[key] = _adapter(value, origin)
        elif key in SECTIONS:
            typed[key] = _section(f"{key}.", value, SECTIONS[key], origin)
        else:
            typed |= _section("", {key: value}, _Top, origin)
    return typed


def _adapter(section: Nested, origin: str, where: str = "adapter") -> Nested:
    section = {**DEFAULT_ADAPTER, **section}
    try:
        cls = adapters.FAMILY.class_of(section, where)
    except UserError as error:
        raise UserError(f"{error}, in {origin}") from error
    options: Nested = {key: value for key, value in section.items() if key != "kind"}
    adapters.FAMILY.check_fields(cls, options, where, origin)
    within: Nested = {}
    for key in [key for key in options if adapters.FAMILY.holds(cls, key)]:
        value: Any = options.pop(key)
        if not (isinstance(value, dict) and value):
            raise UserError(f"{where}.{key} is {value!r} in {origin}, needs keys of its own")
        within[key] = _adapter(value, origin, f"{where}.{key}")
    typed = _section(f"{where}.", options, cls, origin)
    return {"kind": cls.__name__.lower(), **within, **typed}


def _section(prefix: str, values: Nested, cls: type, origin: str) -> Nested:
    """`values` in the types of `cls`, one key at a time, so that an error can name its key."""
    schema = _schema(cls)
    hints = typing.get_type_hints(cls)
    typed: Nested = {}
    for key, value in values.items():
        allowed = _alternatives(hints[key])
        wrong = UserError(f"{prefix}{key} is {value!r} in {origin}, needs {_words(allowed)}")
        # OmegaConf would turn numbers into text and 1 into true. YAML reads a bare `no` or `on`
        # as a truth value and 12:30 as a number, so converting would hide a mistake.
        for exact in (str, bool):
            if exact in allowed and value is not None and not isinstance(value, exact):
                raise wrong
        try:
            OmegaConf.update(schema, key, tuple(value) if isinstance(value, list) else value)
        except (OmegaConfBaseException, TypeError) as error:
            raise wrong from error
        typed[key] = tuple(schema[key]) if isinstance(value, list) else schema[key]
    return typed


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
    words |= {tuple[str, ...]: "a list of words"}
    return " or ".join(words.get(kind, str(kind)) for kind in allowed)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
