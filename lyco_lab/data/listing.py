"""Files that list images: our manifest.jsonl, and the metadata files of Hugging Face's folders.

    manifest.jsonl    file, caption; optionally repeats, trigger, class_word, concept, subclass,
                      category, attributes. An unknown key is an error.
    metadata.jsonl    file_name, and text or caption. Other columns are named, and not used.
    metadata.csv      the same in columns

Paths are relative to the folder of the list, and stay below it. They are compared with composed
letters and suffixes in lower case (names.py).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lyco_lab.data import names
from lyco_lab.data.sources import MOST_REPEATS
from lyco_lab.errors import UserError, nearest
from lyco_lab.readers import read_csv, regular

MANIFEST = "manifest.jsonl"
LISTS = (MANIFEST, "metadata.jsonl", "metadata.csv")
# Names by which other programs list captions, in forms that are not read.
UNREAD = {
    stem + suffix
    for stem in ("metadata", "captions", "caption", "meta_cap", "meta_lat", "labels", "train")
    for suffix in (".parquet", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".yaml", ".yml")
} - set(LISTS)  # fmt: skip
MOST_BYTES = 2**30  # of metadata.csv, which is read at once
LONGEST = 2**20  # characters of a line
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
    images: dict[str, Listed]  # by path (`names.same`), relative to the list's folder
    unused: tuple[str, ...] = ()  # columns
    twice: tuple[str, ...] = ()


def read(path: Path) -> Listing:
    """All lines of a list; `UserError` names the first that is not well formed."""
    ours = names.same(path.name) == MANIFEST
    images: dict[str, Listed] = {}
    unused: dict[str, None] = {}
    twice = []
    for number, entry in _csv(path) if path.suffix.lower() == ".csv" else _lines(path):
        full, where = f"{path}, line {number}", f"{path.name}, line {number}"
        name, listed = (_ours if ours else _theirs)(full, where, entry)
        if name in images:
            twice.append(name)
            continue
        images[name] = listed
        if not ours:
            unused |= dict.fromkeys(k for k in entry if k not in _USED)
    return Listing(path, images, tuple(unused), tuple(twice))


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with regular(path).open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST), ""), 1):
                if len(line) >= LONGEST:
                    raise UserError(
                        f"{path}, line {number}: has {LONGEST:,} characters or more; a list needs "
                        "a line for each image"
                    )
                if line.strip():
                    yield number, parse(f"{path}, line {number}", line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(read_csv(path, ("file_name",), MOST_BYTES), 2)


_USED = ("file_name", "text", "caption")


def parse(where: str, line: str) -> dict[str, Any]:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists
        raise UserError(f"{where}: not JSON that can be read ({error})") from error
    if not isinstance(entry, dict):
        got = line.strip()[:80]
        raise UserError(f"{where}: needs an object with file and caption, got {got}")
    if "\\ud" in line.lower() or "\\u0000" in line:
        _characters(where, entry)
    return entry


def _characters(where: str, entry: Mapping[str, Any]) -> None:
    text = json.dumps(entry, ensure_ascii=False)
    if "\\u0000" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where}: holds \\u0000 or half of a surrogate pair, which are no letters")


def check(where: str, entry: Mapping[str, Any], known: Iterable[str] = KEYS) -> None:
    """The keys and values of a line of our manifest."""
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    for key in ("file", "caption"):
        _text(where, key, entry.get(key))
    count = entry.get("repeats", 1)
    whole = isinstance(count, int) and not isinstance(count, bool)
    if not whole or not 0 <= count <= MOST_REPEATS:
        raise UserError(
            f"{where}: repeats needs a whole number from 0 to {MOST_REPEATS:,}, got {count!r}"
        )


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
    given = {key: entry[key] for key in ("text", "caption") if entry.get(key) not in (None, "")}
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
    return names.same(str(path))
