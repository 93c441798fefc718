"""Files that list images: our manifest.jsonl, and the metadata.jsonl of Hugging Face's folders.

    manifest.jsonl    file, caption; optionally repeats, trigger, class_word, concept, subclass,
                      category, attributes. An unknown key is an error.
    metadata.jsonl    file_name, and text or caption. Other columns are named, and not used.

Paths are relative to the folder of the list, and stay below it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lyco_lab.errors import UserError, nearest

MANIFEST = "manifest.jsonl"
METADATA = "metadata.jsonl"
TEXTS = ("trigger", "class_word", "concept", "subclass", "category")
KEYS = ("file", "caption", "repeats", *TEXTS, "attributes")


@dataclass(frozen=True)
class Listed:
    caption: str
    where: str  # "metadata.jsonl, line 3"
    repeats: int = 1
    texts: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    path: Path
    images: dict[str, Listed]  # by path, relative to the list's folder
    unused: tuple[str, ...] = ()  # columns
    twice: tuple[str, ...] = ()


def read(path: Path) -> Listing:
    """All lines of a list; `UserError` names the first that is not well formed."""
    ours = path.name == MANIFEST
    images: dict[str, Listed] = {}
    unused: dict[str, None] = {}
    twice = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                entry = parse(f"{path}, line {number}", line)
                where = f"{path.name}, line {number}"
                name, listed = (_ours if ours else _theirs)(f"{path}, line {number}", where, entry)
                if name in images:
                    twice.append(name)
                    continue
                images[name] = listed
                if not ours:
                    unused |= dict.fromkeys(k for k in entry if k not in _USED)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return Listing(path, images, tuple(unused), tuple(twice))


_USED = ("file_name", "text", "caption")


def parse(where: str, line: str) -> dict[str, Any]:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where}: needs an object with file and caption, got {line.strip()}")
    return entry


def check(where: str, entry: Mapping[str, Any], known: Iterable[str] = KEYS) -> None:
    """The keys and values of a line of our manifest."""
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    for key in ("file", "caption"):
        _text(where, key, entry.get(key))
    count = entry.get("repeats", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise UserError(f"{where}: repeats needs a whole number >= 0, got {count!r}")


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: needs a {key} that is not empty, got {value!r}")
    return value.strip()


def _ours(full: str, where: str, entry: Mapping[str, Any]) -> tuple[str, Listed]:
    check(full, entry)
    texts = {key: entry[key] for key in TEXTS if entry.get(key) is not None}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f"{full}: {key} needs to be text, got {value!r}")
    attributes = entry.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise UserError(f"{full}: attributes needs an object, got {attributes!r}")
    listed = Listed(entry["caption"].strip(), where, entry.get("repeats", 1), texts, attributes)
    return _inside(full, entry["file"]), listed


def _theirs(full: str, where: str, entry: Mapping[str, Any]) -> tuple[str, Listed]:
    name = _inside(full, _text(full, "file_name", entry.get("file_name")))
    given = {key: entry[key] for key in ("text", "caption") if entry.get(key) is not None}
    if len({str(value).strip() for value in given.values()}) > 1:
        raise UserError(f"{full}: text and caption differ: keep one of them")
    caption = next(iter(given.values()), "")
    if not isinstance(caption, str):
        raise UserError(f"{full}: the caption needs to be text, got {caption!r}")
    return name, Listed(caption.strip(), where)


def _inside(where: str, name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: names {name!r}, which is not below the folder of the list")
    return str(path)
