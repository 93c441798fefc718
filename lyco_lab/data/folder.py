"""A folder of images and captions, checked before anything is trained on it.

Either captions lie beside the images, under the same name,

    0000.png  0000.txt  0001.png  0001.txt  …

or `manifest.jsonl` has a line for each image: `file` and `caption`, and optionally `repeats`,
`trigger`, `class_word`, `concept`, `subclass`, `category` and `attributes`. Nothing is left out
silently: an image that cannot be used is an error with its name.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lyco_lab.data.concepts import Concept
from lyco_lab.errors import UserError, nearest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MANIFEST = "manifest.jsonl"
STRIP = 256  # rows that are put on white at once


@dataclass(frozen=True)
class Item:
    """One training image. `repeats`: how often an epoch shows it."""

    file: Path
    caption: str
    repeats: int = 1
    trigger: str = ""
    class_word: str = ""
    concept: str = ""
    subclass: str = ""
    category: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """The images that a run trains on, in a fixed order."""

    folder: Path
    items: Sequence[Item]

    @property
    def captions(self) -> list[str]:
        return [item.caption for item in self.items]

    @property
    def repeats(self) -> tuple[int, ...]:
        return tuple(item.repeats for item in self.items)

    @property
    def samples_per_epoch(self) -> int:
        return sum(self.repeats)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """What the images show: here one thing."""
        name, rows = self.folder.resolve().name, tuple(range(len(self.items)))
        words = (self.trigger, self.class_word)
        return (Concept(name, name, rows, tuple(self.captions), *words, category=self.category),)

    def part(self, rows: Sequence[int]) -> "Dataset":
        """Some of the images."""
        return Dataset(self.folder, [self.items[row] for row in rows])

    @property
    def trigger(self) -> str:
        """The word that stands for the concept; "" where the images do not agree on one."""
        return self._common("trigger")

    @property
    def class_word(self) -> str:
        return self._common("class_word")

    @property
    def category(self) -> str:
        return self._common("category")

    def _common(self, name: str) -> str:
        values = {getattr(item, name) for item in self.items}
        return values.pop() if len(values) == 1 else ""

    def images(self, side: int) -> NDArray[np.uint8]:
        """All images (N, side, side, 3): the largest square in the middle, resized."""
        fit = functools.partial(ImageOps.fit, size=(side, side), method=Image.Resampling.LANCZOS)
        images = (read_image(item.file) for item in self.items)
        return np.stack([np.asarray(i if i.size == (side, side) else fit(i)) for i in images])

    def digest(self) -> str:
        """Eight hex digits of every pixel file, caption and repeat, wherever the folder lies."""
        h = hashlib.blake2b(digest_size=4)
        for item in self.items:
            h.update(hashlib.blake2b(item.file.read_bytes()).digest())
            h.update(json.dumps([item.caption, item.repeats]).encode())
        return h.hexdigest()


def read_image(file: Path) -> Image.Image:
    """`file` upright and in RGB; what is transparent becomes white."""
    with open_image(file) as opened:
        image = upright(opened)
        if image.has_transparency_data:
            return _on_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """In RGB, strip by strip: of a large image few copies fit into memory."""
    found = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        found.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return found


@contextmanager
def open_image(file: Path) -> Iterator[Image.Image]:
    """The image in `file`; whatever goes wrong with it is an error that names it."""
    try:
        with Image.open(file) as opened:
            yield opened
    except FileNotFoundError:
        raise UserError(
            f"the image {file} does not exist: put it back and run the command again"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for damaged files
        raise UserError(f"cannot read the image {file}: {error}; replace or remove it") from error


def upright(image: Image.Image) -> Image.Image:
    """Turned as its file says it is to be looked at; all of its pixels are in memory."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def read(folder: Path, repeats: int | None = None, limit: int | None = None) -> Dataset:
    """The dataset in `folder`; `repeats` overrides the manifest's, `limit` keeps the first images.

    Raises `UserError` for a folder that is not whole. Pixels are read later, by `Dataset.images`.
    """
    if not folder.is_dir():
        raise UserError(f"the folder of images {folder} does not exist")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    manifest = folder / MANIFEST
    items = _from_manifest(manifest, files) if manifest.is_file() else _from_captions(folder, files)
    if not items:
        raise UserError(
            f"no images in {folder}: it needs {', '.join(SUFFIXES)} files, each with a caption in "
            f"a .txt file of the same name, or {MANIFEST}"
        )
    if repeats is not None:
        items = [replace(item, repeats=repeats) for item in items]
    kept = [item for item in items[:limit] if item.repeats > 0]
    if not kept:
        raise UserError(
            f"0 of the {len(items)} images in {folder} are left after data.limit={limit} and "
            f"data.repeats={repeats}: both need to be at least 1 (or null)"
        )
    return Dataset(folder, tuple(kept))


def _from_captions(folder: Path, files: list[Path]) -> list[Item]:
    items = []
    for file in files:
        try:
            caption = _text(file.with_suffix(".txt"))
        except FileNotFoundError:
            raise UserError(
                f"{file.name} in {folder} has no caption: write one in {file.stem}.txt"
            ) from None
        if not caption:
            raise UserError(f"the caption {file.stem}.txt in {folder} is empty")
        items.append(Item(file, caption))
    heads = {item.caption.split(",")[0].strip() for item in items}
    if len(heads) == 1:  # all captions begin "[trigger] class, …"
        trigger, _, class_word = heads.pop().partition(" ")
        items = [replace(item, trigger=trigger, class_word=class_word) for item in items]
    return items


def _from_manifest(manifest: Path, files: list[Path]) -> list[Item]:
    lines = _text(manifest).splitlines()
    items = [_item(manifest, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    unlisted = [file.name for file in files if file not in {item.file for item in items}]
    if unlisted:
        raise UserError(
            f"{manifest} says nothing of {', '.join(unlisted[:3])}"
            f"{' and others' * (len(unlisted) > 3)}: add a line for each, or remove the files"
        )
    return items


def _item(manifest: Path, number: int, line: str) -> Item:
    where = f"{manifest}, line {number}"
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where}: needs an object with file and caption, got {line.strip()}")
    known = [spec.name for spec in fields(Item)]
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    for key in ("file", "caption"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UserError(f"{where}: needs a {key} that is not empty, got {entry.get(key)!r}")
    count = entry.get("repeats", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise UserError(f"{where}: repeats needs a whole number >= 0, got {count!r}")
    file = manifest.parent / entry["file"]
    if not file.is_file():
        raise UserError(f"{where}: names the image {entry['file']!r}, which does not exist")
    caption = entry["caption"].strip()
    beside = file.with_suffix(".txt")
    if beside.is_file() and _text(beside) != caption:
        raise UserError(
            f"{where}: its caption is {caption!r}, but {beside.name} says {_text(beside)!r}; "
            "make them equal or remove one"
        )
    optional = {k: v for k, v in entry.items() if k not in ("file", "caption") and v is not None}
    return Item(file, caption, **optional)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from error
