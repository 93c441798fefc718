"""Things that a study names by a word: adapters, optimizers.

Each kind is a frozen dataclass in a file of its own, in the package of its family; its fields are
the settings that a study may give, and the class's name in lower case is its word. Existing is
registering: there is no list to edit.

    describe(LoHa(rank=2)) == {"kind": "loha", "rank": 2, "alpha": 2.0, ...}      and back: build

A kind from elsewhere has no word: it is named by `package.module.Class`.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

from lyco_lab.errors import UserError, nearest
from lyco_lab.user_classes import find_class, is_path

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Family(Generic[Thing]):
    """The kinds that stand in one package."""

    section: str  # of a study, that holds such a thing
    base: type[Thing]
    kinds: dict[str, type[Thing]]  # those of a user's own are added as studies name them

    @classmethod
    def find(cls, section: str, base: type[Thing], package: str, path: Any) -> "Family[Thing]":
        """Import every module of `package` and collect the concrete classes below `base`."""
        for module in pkgutil.iter_modules(path, prefix=f"{package}."):
            importlib.import_module(module.name)
        found = {kind.__name__.lower(): kind for kind in _concrete(base, package)}
        return cls(section, base, found)

    def describe(self, thing: Thing) -> dict[str, Any]:
        """The thing in plain words: its kind and its fields, those of one within it alike."""
        described: dict[str, Any] = {"kind": self.word(type(thing))}
        for field in fields(thing):  # type: ignore[arg-type]
            value = getattr(thing, field.name)
            described[field.name] = self.describe(value) if isinstance(value, self.base) else value
        return described

    def build(self, section: Mapping[str, Any], where: str | None = None) -> Thing:
        """The thing that `describe` described; fields left out have their defaults.

        `where` is what errors call the section, followed by a dot and a key of it.
        """
        where = where or self.section
        cls = self.class_of(section, where)
        values = {key: value for key, value in section.items() if key != "kind"}
        self.check_fields(cls, values, where)
        types = {field.name: field.type for field in fields(cls)}  # type: ignore[arg-type]
        for key, value in values.items():
            if isinstance(value, Mapping) and self.holds(cls, key):
                values[key] = self.build(value, f"{where}.{key}")
            else:
                check_type(f"{where}.{key}", value, types[key])
        try:
            return cls(**values)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error

    def word(self, cls: type[Thing]) -> str:
        """What a study calls this kind."""
        word = cls.__name__.lower()
        return word if self.kinds.get(word) is cls else f"{cls.__module__}.{cls.__qualname__}"

    def learn(self, path: str, where: str | None = None) -> type[Thing]:
        """The kind at package.module.Class, which may be a user's own.

        Raises `UserError` unless it is a frozen dataclass below the family's base class.
        """
        if path in self.kinds:
            return self.kinds[path]
        where = where or f"{self.section}.kind"
        needed = f"{self.base.__module__}.{self.base.__qualname__}"
        cls: type[Thing] = find_class(where, path, self.base, needed)
        if inspect.isabstract(cls):
            lacks = ", ".join(sorted(getattr(cls, "__abstractmethods__")))  # noqa: B009
            raise UserError(f"{where} is {path!r}, which has no {lacks}")
        # Its own, since inherited it would not know the fields that the class adds.
        made = cls.__dict__.get("__dataclass_params__")
        if made is None or not made.frozen:
            raise UserError(f"{where} is {path!r}, which needs @dataclass(frozen=True)")
        if self.word(cls) not in self.kinds:
            self.kinds[path] = cls
        return cls

    def class_of(self, section: Mapping[str, Any], where: str | None = None) -> type[Thing]:
        """The dataclass whose fields are the keys of a section."""
        where = where or self.section
        kind = section.get("kind")
        if isinstance(kind, str) and is_path(kind):
            return self.learn(kind, f"{where}.kind")
        known = sorted(self.kinds)
        if not isinstance(kind, str) or kind.lower() not in self.kinds:
            hint = nearest(kind, known) if isinstance(kind, str) else ""
            raise UserError(f"{where}.kind is {kind!r}, needs one of {', '.join(known)}{hint}")
        return self.kinds[kind.lower()]

    def check_fields(
        self,
        cls: type[Thing],
        values: Mapping[str, Any],
        where: str | None = None,
        origin: str = "",
    ) -> None:
        """Raise an error for a key that is no field of `cls`; `origin` says where it was given."""
        where = where or self.section
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes no settings"
                place = f"{where}.{key}" + (f" in {origin}" if origin else "")
                kind = self.word(cls)
                raise UserError(f"{place}: {kind!r} has no {key!r}; {takes}{nearest(key, known)}")

    def holds(self, cls: type[Thing], name: str) -> bool:
        """Whether a field of `cls` holds another thing of the family."""
        return any(
            field.name == name and field.type is self.base
            for field in fields(cls)  # type: ignore[arg-type]
        )


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def check_type(where: str, value: Any, annotation: Any) -> None:
    """Raise an error unless `value` is of the type that a field of a dataclass is declared with.

    A whole number is a number too, and a list of numbers stands for a tuple of them.
    """
    if get_origin(annotation) is Annotated:
        annotation = annotation.__origin__  # without the range declared beside it
    choices = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if any(_is_of(value, choice) for choice in choices):
        return
    needed = " or ".join(
        "null" if choice is type(None) else WORDS.get(choice, _plain(choice)) for choice in choices
    )
    raise UserError(f"{where} is {value!r:.60}, needs {needed}")


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return (
            isinstance(value, tuple | list)
            and len(value) == len(kinds)
            and all(map(_is_of, value, kinds))
        )
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float and isinstance(value, int):
        return abs(value) < 2**1000  # or it has no float
    return isinstance(value, kind)


def _plain(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers"
    return f"a section of its own, as {{kind: ...}}, for one {kind.__name__.lower()}"


def _concrete(parent: type, package: str) -> Iterator[type]:
    child: type
    for child in parent.__subclasses__():
        if child.__module__.startswith(f"{package}.") and not inspect.isabstract(child):
            yield child
        yield from _concrete(child, package)
