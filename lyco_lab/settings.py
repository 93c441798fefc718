"""What the value of a setting may be, declared beside the setting.

    steps: Annotated[int, Within(1, 10**8)] = 300
    folder: Annotated[str | None, PATH] = None

A setting is a field of a dataclass: a section of a run, an adapter, an optimizer. Every number has
a range, so that an absurd one is an error when the run is built, and no overflow, hang or shortage
of memory hours later. Every text that says where something lies on this machine is marked `PATH`:
such text has to be a path, and only its last part is shown outside of this machine.
"""

import functools
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from lyco_lab.errors import UserError

LONGEST_TEXT = 10_000  # characters of a setting
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, what Linux takes
SHOWN = 100  # characters of a value in a message


@dataclass(frozen=True)
class Within:
    """The smallest and the largest number; of a list or a mapping, for each number in it."""

    low: float
    high: float

    def check(self, key: str, value: object) -> None:
        """Raise an error unless every number in `value` is in the range; NaN is in none."""
        for number in _numbers(value):
            if not self.low <= number <= self.high:
                raise UserError(f"{key} is {shown(value)}, needs {self.words}")

    @property
    def words(self) -> str:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return f"a number from {self.low:,} to {self.high:,}"
        return f"a number from {self.low:g} to {self.high:g}"


class _Path:
    """The mark of a setting that says where something lies."""


PATH = _Path()
# Numbers that move with gamma. In float32 every product and quotient of one of them and a rank is
# a normal number.
POSITIVE = Within(1e-30, 1e30)
NOT_NEGATIVE = Within(0.0, 1e30)
SHARE = Within(0.0, 1.0)
STEPS = Within(1, 10**8)
SIZE = Within(1, 10**6)  # of ranks and blocks; a layer takes what it allows
SEED = Within(0, 2**53)


def shown(value: object) -> str:
    """A value in a message, which stays readable whatever it is."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]}… ({len(text):,} characters)"


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """Field -> its type, without what is declared beside it."""
    return typing.get_type_hints(cls)


@functools.cache
def marks(cls: type) -> dict[str, tuple[Any, ...]]:
    """Field -> what is declared beside it."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {spec.name: tuple(_declared(hints[spec.name])) for spec in fields(cls)}


def within(cls: type, name: str) -> Within | None:
    """The range of a numeric setting."""
    return next((mark for mark in marks(cls)[name] if isinstance(mark, Within)), None)


def is_path(cls: type, name: str) -> bool:
    return PATH in marks(cls)[name]


def check(thing: Any, where: str = "") -> None:
    """Raise an error for a setting of `thing`, or of what it holds, that is not as declared.

    `where` is what stands before a setting's name in messages: "train.".
    """
    for spec in fields(thing):
        value, key = getattr(thing, spec.name), f"{where}{spec.name}"
        if is_dataclass(value):
            check(value, f"{key}.")
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for number, each in enumerate(value, start=1):
                check(each, f"{key}[{number}].")
        else:
            check_value(type(thing), spec.name, key, value)


def check_value(cls: type, name: str, key: str, value: object) -> None:
    """Raise an error unless `value` may be the value of the field `name`; `key` names it."""
    check_text(key, value)
    if (numbers := within(cls, name)) is not None:
        numbers.check(key, value)
    if isinstance(value, str) and is_path(cls, name):
        size = len(os.fsencode(value))
        longest = max(len(os.fsencode(part)) for part in value.split("/"))
        if longest > LONGEST_NAME or size > LONGEST_PATH:
            raise UserError(
                f"{key} is {shown(value)}, needs a path of at most {LONGEST_PATH:,} bytes, and "
                f"{LONGEST_NAME} in each part"
            )


def without_folders(config: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """A configuration, as `dataclasses.asdict(cls(...))`, with paths cut to their last part."""
    hints = types_of(cls)
    cut: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and is_dataclass(hints.get(name)):
            cut[name] = without_folders(value, hints[name])
        elif name in hints and is_path(cls, name):
            cut[name] = None if value is None else Path(value).name
        elif name in hints and isinstance(value, str):
            cut[name] = value
        else:
            cut[name] = _last_parts(value)
    return cut


def _last_parts(value: Any) -> Any:
    """Absolute paths in what has no declaration, such as the arguments of a callback, cut too."""
    if isinstance(value, Mapping):
        return {key: _last_parts(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_last_parts(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value


def _declared(hint: Any) -> Iterator[Any]:
    yield from getattr(hint, "__metadata__", ())
    for inner in typing.get_args(hint):
        yield from _declared(inner)


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, int | float) and not isinstance(item, bool):
            yield item


def check_text(key: str, value: object) -> None:
    """Raise an error for text, in `value` or what it holds, that no file or screen can hold."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_text(key, name)
            check_text(key, item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_text(key, item)
    elif isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            raise UserError(f"{key} is {shown(value)}, needs at most {LONGEST_TEXT:,}")
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(f"{key} is {shown(value)}, needs text in UTF-8 without zero bytes")
