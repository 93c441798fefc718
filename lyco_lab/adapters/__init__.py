"""Adapters: one file each, found by existing; there is no list to edit.

`loha.py` defines `class LoHa(Adapter)`, which a study's configuration calls "loha". `base.py` says
what an adapter is, `mount.py` puts one on layers, `plan.py` computes such a layer.

    describe(LoHa(rank=2)) == {"kind": "loha", "rank": 2, "alpha": 2.0, ...}      and back: build
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from lyco_lab.adapters.base import Adapter
from lyco_lab.errors import UserError, nearest


def _concrete(parent: type) -> Iterator[type[Adapter]]:
    child: type[Adapter]
    for child in parent.__subclasses__():
        if child.__module__.startswith(f"{__name__}."):
            if not inspect.isabstract(child):
                yield child
            yield from _concrete(child)


for _module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    importlib.import_module(_module.name)

ADAPTERS: dict[str, type[Adapter]] = {cls.__name__.lower(): cls for cls in _concrete(Adapter)}


def describe(adapter: Adapter) -> dict[str, Any]:
    """The adapter in plain words: its kind and its fields, those of an adapter within it alike."""
    described: dict[str, Any] = {"kind": type(adapter).__name__.lower()}
    for field in fields(adapter):
        value = getattr(adapter, field.name)
        described[field.name] = describe(value) if isinstance(value, Adapter) else value
    return described


def build(section: Mapping[str, Any], where: str = "adapter") -> Adapter:
    """The adapter that `describe` described; fields left out have their defaults.

    `where` is what errors call the section, followed by a dot and a key of it.
    """
    cls = class_of(section, where)
    values = {key: value for key, value in section.items() if key != "kind"}
    check_fields(cls, values, where)
    for key, value in values.items():
        if isinstance(value, Mapping) and holds_adapter(cls, key):
            values[key] = build(value, f"{where}.{key}")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def class_of(section: Mapping[str, Any], where: str = "adapter") -> type[Adapter]:
    """The dataclass whose fields are the keys of a section."""
    kind = section.get("kind")
    known = sorted(ADAPTERS)
    if not isinstance(kind, str) or kind.lower() not in ADAPTERS:
        hint = nearest(kind, known) if isinstance(kind, str) else ""
        raise UserError(f"{where}.kind is {kind!r}, needs one of {', '.join(known)}{hint}")
    return ADAPTERS[kind.lower()]


def check_fields(
    cls: type[Adapter], values: Mapping[str, Any], where: str = "adapter", origin: str = ""
) -> None:
    """Raise an error for a key that is no field of `cls`; `origin` says where it was given."""
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no settings"
            place = f"{where}.{key}" + (f" in {origin}" if origin else "")
            kind = cls.__name__.lower()
            raise UserError(f"{place}: {kind!r} has no {key!r}; {takes}{nearest(key, known)}")


def holds_adapter(cls: type[Adapter], name: str) -> bool:
    """Whether a field of the adapter is an adapter itself."""
    return any(field.name == name and field.type is Adapter for field in fields(cls))
