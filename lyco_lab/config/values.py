"""Values as a study's files and the command line spell them, and as the settings need them.

`load` reads YAML. Numbers are decimal: what YAML 1.1 alone takes for a number (010 for 8, 12:30 for
750, 1_0 for 10) is text here, which no number accepts. A file that would grow beyond what a study
can be, through anchors or nesting, is refused before it is built.

`spelled` reads what stands behind `=` on the command line. `resolve` replaces ${section.key} by the
value of that setting. `convert` makes a value one of the type that a setting has.
"""

import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lyco_lab.errors import UserError
from lyco_lab.readers import read_text
from lyco_lab.settings import LONGEST_TEXT, shown

FILE_BYTES = 2**20  # of a study's YAML
MOST = 2**20  # nodes and characters of it, once anchors and ${...} are written out
DEEPEST = 50  # nesting of lists and mappings
WHOLE = re.compile(r"[-+]?[0-9]+", re.ASCII)
DECIMAL = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", re.ASCII)
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
MOST_DIGITS = 400  # of a number; more are an accident
# An odd number of backslashes in front says that `${` is text; OmegaConf keeps half of them.
OPENING = re.compile(r"(\\*)\$\{")
REFERENCE = re.compile(OPENING.pattern + r"([^{}]*)\}")
PLAIN = re.compile(r"(\.*)([A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)")
CORE = ("str", "int", "float", "bool", "null", "map", "seq", "merge")


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are decimal, and whose mappings say each key once."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Those of YAML 1.1 without its numbers and dates, and decimal numbers."""
    replaced = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
    kept = {
        first: [(tag, pattern) for tag, pattern in found if tag not in replaced]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = re.compile(rf"(?![-+]?0[0-9]+$)(?:{DECIMAL.pattern}|{NOT_FINITE.pattern})$", re.ASCII)
    for first in "-+.0123456789":
        kept.setdefault(first, []).append(("tag:yaml.org,2002:float", number))
    return kept


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    found = number(str(loader.construct_scalar(node)))
    if found is None:
        raise yaml.constructor.ConstructorError(
            None, None, f"{shown(node.value)} is no decimal number", node.start_mark
        )
    return found


_Loader.yaml_implicit_resolvers = _resolvers()
for _name in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _number)


def number(text: str) -> int | float | None:
    """The decimal number that `text` spells; None where it spells none.

    A whole number with a leading zero is none: some read it as octal.
    """
    if len(text) > MOST_DIGITS:
        return None
    if WHOLE.fullmatch(text):
        digits = text.lstrip("+-")
        return None if len(digits) > 1 and digits.startswith("0") else int(text)
    if DECIMAL.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if NOT_FINITE.fullmatch(text) else None


def load(text: str) -> Any:
    """What a YAML document holds. Raises `ValueError` with what is wrong, in one line."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure_nodes(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        if loader is not None:
            loader.dispose()


def read(path: Path) -> Any:
    """What a YAML file holds."""
    text = read_text(path, FILE_BYTES)
    try:
        return load(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error


def spelled(text: str, hints: tuple[Any, ...]) -> Any:
    """What stands behind `=`, for a setting that may have one of these types.

    Text is taken as it is, but for `null` where a setting may be null. Only lists and mappings are
    YAML. Raises `ValueError`.
    """
    if str in hints and not any(_is_list(hint) for hint in hints):
        return None if text == "null" and type(None) in hints else text
    bare = text.strip()
    if bare.startswith(("[", "{")) and not bare.startswith("${"):
        return load(bare)
    if (found := number(bare)) is not None:
        return found
    words = {"true": True, "false": False, "null": None, "~": None, "": None}
    words |= {"yes": True, "no": False, "on": True, "off": False}
    return words.get(bare.lower(), text)


def resolve(merged: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """`merged` with each ${section.key} replaced by the value of that setting, by OmegaConf.

    ${.key} is a setting of the same section, ${..key} one of the section around it. Text of which
    a reference is only a part becomes text. `\\${` is no reference (see `literal`). What OmegaConf
    would read from outside of the study, or could not hold in memory, is refused before it begins.
    """
    if not _refers(merged):
        return dict(merged)
    size = _References(merged, origin).size(merged, ())
    if size > MOST:
        raise UserError(
            f"the settings in {origin} are too much: more than {MOST:,} values and characters"
        )
    try:
        found = OmegaConf.to_container(OmegaConf.create(dict(merged)), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{' '.join(str(error).split())}, in {origin}") from error
    return typing.cast(dict[str, Any], found)


def literal(text: str) -> str:
    """What `resolve` reads as this very text, whatever it looks like."""
    return OPENING.sub(lambda match: match[1] * 2 + "\\${", text)


def _refers(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_refers, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_refers, value))
    return isinstance(value, str) and "${" in value


class _References:
    """Checks every reference, and counts what all become once they are written out."""

    def __init__(self, root: Mapping[str, Any], origin: str) -> None:
        self.root, self.origin = root, origin
        self.known: dict[tuple[str, ...], int] = {}
        self.within: list[tuple[str, ...]] = []

    def at(self, path: tuple[str, ...]) -> int:
        """The size of the value at a path; that of a value that is used often is found once."""
        if path not in self.known:
            here = self._value(path)
            if path in self.within or len(self.within) > DEEPEST:
                raise self._wrong(here, path, "leads back to itself")
            self.within.append(path)
            self.known[path] = self.size(here, path)
            self.within.pop()
        return self.known[path]

    def size(self, value: Any, path: tuple[str, ...]) -> int:
        if isinstance(value, Mapping):
            return 1 + sum(self.size(item, (*path, str(key))) for key, item in value.items())
        if isinstance(value, list | tuple):
            return 1 + sum(self.size(item, (*path, str(i))) for i, item in enumerate(value))
        if isinstance(value, str) and "${" in value:
            return self._text(value, path)
        return len(value) if isinstance(value, str) else 1

    def _text(self, text: str, path: tuple[str, ...]) -> int:
        whole = REFERENCE.fullmatch(text)
        if whole and not whole[1]:
            return self.at(self._path(text, whole[2], path))
        opened = sum(len(match[1]) % 2 == 0 for match in OPENING.finditer(text))
        references = [found for found in REFERENCE.finditer(text) if len(found[1]) % 2 == 0]
        if opened != len(references):
            raise self._wrong(text, path, "opens ${ and does not close it")
        size = len(text)
        for match in references:
            other = self._path(text, match[2], path)
            size += self.at(other)
            if isinstance(self._value(other), Mapping | list):
                raise self._wrong(text, path, f"puts {match[0]}, which is no text, into text")
            if size > LONGEST_TEXT:
                raise self._wrong(text, path, f"becomes more than {LONGEST_TEXT:,} characters")
        return size

    def _value(self, path: tuple[str, ...]) -> Any:
        here: Any = self.root
        for part in path:
            here = _entry(here, part)
        return here

    def _path(self, text: str, reference: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if ":" in reference:
            key, name = ".".join(path), reference.rpartition(":")[2]
            raise self._wrong(
                text,
                path,
                "asks for something outside of the study, which the run's folder and W&B would "
                f'then show: write the value itself, or give it to the command: "{key}=${name}"',
            )
        plain = PLAIN.fullmatch(reference.strip())
        if plain is None:
            raise self._wrong(text, path, "is no reference: write ${section.key}")
        up, names = len(plain[1]), tuple(plain[2].split("."))
        start = path[: len(path) - up] if up else ()
        if self._value((*start, *names)) is _MISSING or up > len(path):
            raise self._wrong(
                text, path, f"refers to {'.'.join((*start, *names))!r}, which no file gives"
            )
        return (*start, *names)

    def _wrong(self, value: object, path: tuple[str, ...], why: str) -> UserError:
        return UserError(f"{'.'.join(path)} is {shown(value)} in {self.origin}, which {why}")


_MISSING = object()


def _entry(here: Any, part: str) -> Any:
    if isinstance(here, Mapping):
        return here.get(part, _MISSING)
    if isinstance(here, list | tuple) and part.isdecimal() and int(part) < len(here):
        return here[int(part)]
    return _MISSING


def convert(value: Any, hint: Any) -> Any:
    """`value` in the type `hint`. Raises `TypeError` where it is another."""
    allowed = alternatives(hint)
    if value is None and type(None) in allowed:
        return None
    for kind in allowed:
        make = _makers(kind)
        if make is not None and (made := make(value)) is not _MISSING:
            return made
    raise TypeError


def _makers(kind: Any) -> Callable[[Any], Any] | None:
    simple: dict[Any, Callable[[Any], Any]] = {
        str: lambda value: value if isinstance(value, str) else _MISSING,
        bool: lambda value: value if isinstance(value, bool) else _MISSING,
        int: lambda value: _as_number(value, int),
        float: lambda value: _as_number(value, float),
        Any: lambda value: value if _is_plain(value) else _MISSING,
    }
    if kind in simple:
        return simple[kind]
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return lambda value: _as_tuple(value, inner)
    if typing.get_origin(kind) is dict:
        return lambda value: _as_dict(value, inner[1])
    return None


def _as_number(value: Any, kind: type) -> Any:
    if isinstance(value, str):  # quoted
        value = number(value)
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return kind(value) if fits else _MISSING


def _as_tuple(value: Any, kinds: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return _MISSING
    each = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else list(kinds)
    if len(each) != len(value):
        return _MISSING
    return tuple(convert(item, kind) for item, kind in zip(value, each, strict=True))


def _as_dict(value: Any, kind: Any) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return _MISSING
    return {key: convert(item, kind) for key, item in value.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str | int) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """`int | None` -> (int, None's type)."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


COUNTS = {2: "two", 3: "three", 4: "four"}


def words(hint: Any) -> str:
    """A type in the user's words, with an example where one helps."""
    return " or ".join(_word(kind) for kind in alternatives(hint))


def _word(kind: Any) -> str:
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    simple[type(None)] = "null"
    if kind in simple:
        return simple[kind]
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return "names with numbers, as {eps: 0.5}" if inner[1] is float else "names with values"
    if inner[-1] is Ellipsis:
        return "a list of words, as [one, two]"
    noun, example = ("whole numbers", (320, 960, 64)) if inner[0] is int else ("numbers", (0.9, 1))
    shown_list = ", ".join(map(str, example[: len(inner)]))
    return f"a list of {COUNTS.get(len(inner), str(len(inner)))} {noun}, as [{shown_list}]"


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, dict)


def measure(value: Any, wrong: Callable[[str], Exception]) -> None:
    """Raise an error for what would be too much once shared parts are written out."""
    sizes: dict[int, int] = {}

    def size(item: Any, depth: int) -> int:
        if depth > DEEPEST:
            raise wrong(f"nested more than {DEEPEST} deep")
        if isinstance(item, str):
            return 1 + len(item)
        if not isinstance(item, Mapping | list | tuple):
            return 1
        if id(item) not in sizes:
            inner = item.values() if isinstance(item, Mapping) else item
            sizes[id(item)] = 1 + sum(size(each, depth + 1) for each in inner)
        return sizes[id(item)]

    if size(value, 0) > MOST:
        raise wrong(f"more than {MOST:,} values and characters")


def _measure_nodes(root: yaml.Node) -> None:
    """Raise a `ValueError` for a document too deep, too large once its anchors are written out, of
    tags that are not YAML's own, or with a key that stands twice in a mapping."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        if node.tag.removeprefix("tag:yaml.org,2002:") not in CORE:
            raise ValueError(f"it has the tag {shown(node.tag)} in line {node.start_mark.line + 1}")
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value)
        if sizes.get(id(node)) == 0:
            raise ValueError(f"an anchor in line {node.start_mark.line + 1} holds itself")
        if id(node) not in sizes:
            sizes[id(node)] = 0
            parts = list(node.value)
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
                parts = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
        return sizes[id(node)]

    if size(root, 0) > MOST:
        raise ValueError(f"it is more than {MOST:,} values and characters")


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"a key in line {key.start_mark.line + 1} is a list or a mapping")
        if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
            line = key.start_mark.line + 1
            raise ValueError(
                f"the key {shown(key.value)} stands twice in a mapping, in line {line}"
            )
        seen.add(key.value)
