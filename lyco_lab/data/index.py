"""Which images there are, in columns: found, looked at and judged, without decoding a pixel.

Every file below a source's folder ends in one of three ways: *used*; *dropped*, with the reason; or
*other*, not an image at all. Nothing is passed over in silence: `report` counts all of them, and
`write` lists each. What a file says is read once and remembered under its stamp (memo.py), so that
a second look costs only the walk through the folders.

A caption comes from, in this order: manifest.jsonl, metadata.jsonl or metadata.csv in the image's
folder or above it; a text file beside it, of the same name; the words of a folder N_CONCEPT, or a
source's class_tokens. Two that differ are a reason to drop the image, as neither is known to be
meant. Which it was is noted of each image, and words that stand in for captions are counted: they
may be there because the captions have other names than was thought.
"""

import csv
import hashlib
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import splitext
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lyco_lab.data import captions, class_folders, headers, listing, names
from lyco_lab.data.class_folders import NUMBERED
from lyco_lab.data.headers import FORMATS, OTHER_FORMATS, Unusable
from lyco_lab.data.listing import LISTS, MANIFEST, UNREAD, Listed
from lyco_lab.data.memo import Known, Memo
from lyco_lab.data.scan import Folder, Lost, Stamp, pseudo, walk
from lyco_lab.data.sources import MASK_FOLDER, MASK_SUFFIX, MOST_REPEATS, Source
from lyco_lab.errors import UserError, one_line
from lyco_lab.files import atomic, cell

SAVE_EVERY_S = 10.0  # a look at many files that is stopped loses no more than this
# "class" and "leaf": the concept that an image is of and its sub-class, as lists or folders say;
# "origin": where its caption is from.
TEXTS = ("file", "caption", "origin", "mask", "attributes", *listing.TEXTS, "class", "leaf")
FOLDER_WORDS, CLASS_TOKENS = "the words of its folder", "class_tokens"  # as origins
COLUMNS = (
    "file", "status", "reason", "width", "height", "repeats", "caption", "caption_from",
)  # fmt: skip
# Suffixes that captions are known to have; where they lie beside an image, and are not asked for,
# that is said.
USUAL = {".txt", ".caption", ".cap", ".text", ".tags", ".wd14cap", ".wdtag", ".prompt", ".json"}
Above = tuple[str, dict[str, Listed]] | None


@dataclass
class _Rows:
    """Images under construction, one entry of each list per image."""

    texts: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in TEXTS})
    digests: list[bytes] = field(default_factory=list)
    numbers: "array[int]" = field(
        default_factory=lambda: array("i")
    )  # source, width, height, repeats

    def add(self, numbers: Sequence[int], digest: bytes, **texts: str) -> None:
        self.numbers.extend(numbers)
        self.digests.append(digest)
        for name, column in self.texts.items():
            column.append(texts.get(name, ""))


@dataclass(frozen=True)
class Index:
    """The images that can be used, in order: by source, folder and name."""

    sources: tuple[Source, ...]
    texts: dict[str, Any]  # name -> column of strings; files are relative to their source's folder
    source_N: NDArray[np.int32]
    width_N: NDArray[np.int32]  # as the picture is looked at, whatever way the file holds it
    height_N: NDArray[np.int32]
    repeats_N: NDArray[np.int32]
    digests: Any  # of their bytes; b"" of those that were not decoded yet
    dropped: tuple[Lost, ...]  # images, with their full path
    other: tuple[Lost, ...]  # files that are no images
    remarks: tuple[str, ...] = ()  # on the folders, one line each

    def __len__(self) -> int:
        return len(self.source_N)

    def file(self, i: int) -> Path:
        return self.sources[self.source_N[i]].folder / self.text("file", i)

    def text(self, name: str, i: int) -> str:
        found: str = self.texts[name][int(i)].as_py()
        return found

    @property
    def prior_N(self) -> NDArray[np.bool_]:
        """Which images only keep the model from forgetting."""
        priors = np.array([source.prior for source in self.sources], bool)
        return priors[self.source_N]

    def captions(self) -> list[str]:
        """All of them, as they are where nothing is drawn."""
        rules = [source.captions for source in self.sources]
        texts = self.texts["caption"].to_pylist()
        return [rules[n].draw(text) for n, text in zip(self.source_N.tolist(), texts, strict=True)]

    def files(self) -> list[str]:
        """The paths of all images."""
        roots = [str(source.folder) for source in self.sources]
        names = self.texts["file"].to_pylist()
        return [f"{roots[n]}/{name}" for n, name in zip(self.source_N.tolist(), names, strict=True)]

    def select(self, rows: NDArray[Any], lost: Sequence[Lost] = ()) -> "Index":
        """Some of the images; the others are `lost`."""
        return Index(
            self.sources,
            {name: column.take(pa.array(rows)) for name, column in self.texts.items()},
            self.source_N[rows],
            self.width_N[rows],
            self.height_N[rows],
            self.repeats_N[rows],
            self.digests.take(pa.array(rows)),
            (*self.dropped, *lost),
            self.other,
            self.remarks,
        )

    def drop(self, reasons: dict[int, str]) -> "Index":
        """Without some images."""
        rows = np.setdiff1d(np.arange(len(self)), np.fromiter(reasons, np.int64, len(reasons)))
        return self.select(rows, [Lost(str(self.file(i)), why) for i, why in reasons.items()])

    def balanced(self) -> "Index":
        """With repeats that give each class nearly as many samples as the largest has images.

        A class is what the lists call a concept; else the folder of an image.
        """
        if not len(self):
            return self
        names = np.array(
            [
                f"{source} {concept or PurePosixPath(file).parent}"
                for source, concept, file in zip(
                    self.source_N.tolist(),
                    self.texts["concept"].to_pylist(),
                    self.texts["file"].to_pylist(),
                    strict=True,
                )
            ]
        )
        _, class_N, count = np.unique(names, return_inverse=True, return_counts=True)
        times = np.maximum(1, np.rint(count.max() / count)).astype(np.int32)
        repeats_N = np.where(self.prior_N, self.repeats_N, times[class_N])
        return replace(self, repeats_N=repeats_N.astype(np.int32))

    def digest(self, digests: Sequence[bytes]) -> str:
        """Eight hex digits of all pixels, captions, repeats and rules, wherever the folders lie."""
        h = hashlib.blake2b(digest_size=4)
        for source in self.sources:
            h.update(repr(replace(source, folder=Path())).encode())
        rows = zip(
            digests,
            self.texts["caption"].to_pylist(),
            self.repeats_N.tolist(),
            self.source_N.tolist(),
            strict=True,
        )
        for content, *rest in rows:
            h.update(content)
            h.update(json.dumps(rest).encode())
        return h.hexdigest()

    def reasons(self) -> Counter[str]:
        """Why images were dropped, and how many for each reason."""
        return Counter(why.partition(":")[0] for _, why in self.dropped)

    def report(self) -> list[str]:
        """What was found, in a few lines."""
        lines = [f"{len(self)} images used, {len(self.dropped)} dropped"]
        for reason, count in self.reasons().most_common():
            first = next(lost for lost in self.dropped if lost.reason.startswith(reason))
            lines.append(f"  dropped, {reason}: {count} (the first: {one_line(first.path)})")
        if self.other:
            kinds = Counter(why.partition(":")[0] for _, why in self.other)
            said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            lines.append(f"  not images: {said}")
        return [
            *lines,
            *(
                f"  {one_line(line)}"
                for line in (*self.stand_ins(), *self._masked(), *self.remarks)
            ),
        ]

    def _masked(self) -> list[str]:
        """How many images have a mask, where masks are files: some may be named otherwise."""
        asks = np.array([source.masks == "files" for source in self.sources], bool)[self.source_N]
        if not asks.any():
            return []
        found = sum(map(bool, self.texts["mask"].to_pylist()))
        where = f"NAME{MASK_SUFFIX} or {MASK_FOLDER}/NAME.png"
        return [f"{found} of {asks.sum()} images have a mask ({where})"]

    def stand_ins(self) -> list[str]:
        """How many images have a folder's words or class_tokens as caption, where any has."""
        lines = []
        origins = self.texts["origin"].to_pylist()
        for origin, said in ((FOLDER_WORDS, "the words of their folder"), (CLASS_TOKENS,) * 2):
            if rows := [i for i, each in enumerate(origins) if each == origin]:
                lines.append(
                    f"{len(rows)} of {len(self)} images have {said} as caption (the first: "
                    f"{self.file(rows[0])}: {self.text('caption', rows[0])!r})"
                )
        return lines

    def write(self, path: Path) -> None:
        """A CSV file with a line for every file."""
        with atomic(path) as temporary, _text(temporary) as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            for i in range(len(self)):
                size = (int(self.width_N[i]), int(self.height_N[i]), int(self.repeats_N[i]))
                texts = (self.text("caption", i), self.text("origin", i))
                table.writerow(map(cell, [self.file(i), "used", "", *size, *texts]))
            for status, losses in (("dropped", self.dropped), ("other", self.other)):
                for lost in losses:
                    row = [lost.path, status, lost.reason, "", "", "", "", ""]
                    table.writerow(map(cell, row))


def _text(path: Path) -> IO[str]:
    """A table to be written; names that are not UTF-8 are written in codes."""
    return path.open("w", newline="", encoding="utf-8", errors="backslashreplace")


def build(sources: Sequence[Source], memo: Memo) -> Index:
    """All images of some sources. What is learned of files goes to the memo, and is saved."""
    rows, dropped, other, remarks = _Rows(), list[Lost](), list[Lost](), dict[str, None]()
    with headers.strict():
        for number, source in enumerate(sources):
            if not source.folder.is_dir():
                raise UserError(f"the folder of images {source.folder} does not exist")
            if pseudo(source.folder):
                raise UserError(
                    f"the folder of images {source.folder} is the kernel's, which holds no files: "
                    "name one on a disk"
                )
            _Reader(number, source, memo, rows, dropped, other, remarks).read()
    memo.save()
    numbers = np.array(rows.numbers, np.int32).reshape(-1, 4)
    source_N, width_N, height_N, repeats_N = np.ascontiguousarray(numbers.T)
    return Index(
        tuple(sources),
        {name: pa.array(column, pa.string()) for name, column in rows.texts.items()},
        source_N,
        width_N,
        height_N,
        repeats_N,
        pa.array(rows.digests, pa.binary()),
        tuple(dropped),
        tuple(other),
        tuple(remarks),
    )


@dataclass
class _Reader:
    """Judges the files of one source."""

    number: int
    source: Source
    memo: Memo
    rows: _Rows
    dropped: list[Lost]
    other: list[Lost]
    remarks: dict[str, None]
    counts: dict[str, list[str]] = field(default_factory=dict)  # remark -> the files it is on
    lists: dict[str, dict[str, Listed]] = field(default_factory=dict)  # by their folder
    root: str = ""
    saved_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.root = str(self.source.folder)

    def read(self) -> None:
        lost: list[Lost] = []
        listed_seen: set[str] = set()
        for folder in walk(self.source.folder, lost, recursive=self.source.recursive):
            if PurePosixPath(folder.path).name == MASK_FOLDER and self.source.masks == "files":
                continue  # looked at beside the images
            self._lists(folder)
            self._images(folder, listed_seen)
        for path, reason in lost:
            image = splitext(path)[1].lower() in FORMATS.keys() | OTHER_FORMATS
            # Of a folder that cannot be entered it is not known what is lost.
            image = image or reason.startswith(("folder not readable", "name not UTF-8"))
            (self._drop if image and "hidden" not in reason else self._other)(path, reason)
        for where, images in self.lists.items():
            for name in images:
                path = f"{where}/{name}" if where else name
                if path not in listed_seen:
                    self._drop(path, f"listed and missing: {images[name].where} names it")
        for remark, files in self.counts.items():
            self.remarks[f"{len(files)} {remark} (the first: {self.root}/{files[0]})"] = None

    def _count(self, remark: str, path: str) -> None:
        self.counts.setdefault(remark, []).append(path)

    def _drop(self, path: str, reason: str) -> None:
        self.dropped.append(Lost(f"{self.root}/{path}", reason))

    def _other(self, path: str, kind: str) -> None:
        self.other.append(Lost(f"{self.root}/{path}", kind))

    def _lists(self, folder: Folder) -> None:
        found = [name for name in folder.files if names.same(name).lower() in LISTS]
        where = self.source.folder / folder.path
        if len(found) > 1:
            raise UserError(f"{where} holds {' and '.join(found)}: keep one of them")
        if not found:
            return
        read = listing.read(where / found[0])
        self.lists[names.composed(folder.path)] = read.images
        for name in read.twice:
            self._drop(folder.name(name), f"listed twice: the first line of {found[0]} counts")
        if read.unused:
            self.remarks[f"{read.path}: columns not used: {', '.join(read.unused)}"] = None

    def _images(self, folder: Folder, seen: set[str]) -> None:
        stems: dict[str, list[str]] = {}
        for name in folder.files:
            stem, suffix = names.parts(name)
            if suffix in FORMATS and not self._is_mask(name):
                stems.setdefault(stem, []).append(name)
        by_name = names.by_sameness(folder.files)
        masks = self._masks(folder) if stems and self.source.masks == "files" else {}
        images = {names.same(name) for same in stems.values() for name in same}
        for name in folder.files:
            self._file(name, folder, stems.keys() | images)
        repeats, words, words_from = self._numbered(folder)
        above, concept = self._above(folder), _concept(folder)
        for stem, twins in stems.items():
            for name in twins:
                path = folder.name(name)
                seen.add(names.same(path))
                if len(twins) > 1:
                    others = ", ".join(other for other in twins if other != name)
                    self._drop(path, f"name used twice: {others} lies beside it")
                    continue
                place = _Place(folder, by_name, masks, above, concept, repeats, words, words_from)
                try:
                    self._image(name, stem, place)
                except Unusable as reason:
                    self._drop(path, str(reason))
        if time.monotonic() - self.saved_s > SAVE_EVERY_S:
            self.memo.save()
            self.saved_s = time.monotonic()

    def _is_mask(self, name: str) -> bool:
        return self.source.masks == "files" and name.lower().endswith(MASK_SUFFIX)

    def _masks(self, folder: Folder) -> dict[str, list[str]]:
        """The masks beside a folder's images and in the folder of masks, by stem."""
        try:
            inside = sorted(os.listdir(self.source.folder / folder.path / MASK_FOLDER))
        except OSError:
            inside = []
        found: dict[str, list[str]] = {}
        for name in filter(self._is_mask, folder.files):
            found.setdefault(names.composed(name[: -len(MASK_SUFFIX)]), []).append(name)
        for name in inside:
            stem, suffix = names.parts(name)
            if suffix == ".png":
                found.setdefault(stem, []).append(f"{MASK_FOLDER}/{name}")
        return found

    def _file(self, name: str, folder: Folder, images: set[str]) -> None:
        """A file that is no image of a format that is read. `images`: their stems and names."""
        stem, suffix = names.parts(name)
        if suffix in OTHER_FORMATS:
            self._drop(folder.name(name), f"format not supported: {suffix}")
        elif names.same(name).lower() in LISTS or suffix in FORMATS:
            return
        elif suffix in self._extensions and name.lower() not in UNREAD:
            if stem not in images and names.same(stem) not in images:
                self._other(folder.name(name), "captions without an image")
        else:
            kind = f"{suffix} files" if suffix else "files without a suffix"
            self._other(folder.name(name), kind)
            if name.lower() in UNREAD and stem not in images:
                self.remarks[
                    f"{self.root}/{folder.name(name)} is not read: lists of captions are "
                    f"{', '.join(LISTS)}"
                ] = None

    @cached_property
    def _extensions(self) -> tuple[str, ...]:
        return tuple(suffix.lower() for suffix in self.source.extensions)

    def _numbered(self, folder: Folder) -> tuple[int, str, str]:
        """Repeats and words of the innermost folder N_CONCEPT around, and whose words they are."""
        if not self.source.numbered:
            return 1, self.source.class_tokens, CLASS_TOKENS
        root = self.source.folder.resolve().name
        for part in reversed([root, *PurePosixPath(folder.path).parts]):
            if match := NUMBERED.fullmatch(part):
                repeats = int(match[1])
                if repeats > MOST_REPEATS and self.source.repeats is None:
                    raise UserError(
                        f"the folder {part!r} in {self.root} asks for {repeats:,} repeats, more "
                        f"than {MOST_REPEATS:,}: rename it, or set data.repeats"
                    )
                if repeats and self.source.repeats is None and folder.files:
                    self.remarks[f"{part}: {repeats} repeats, as the folder's name says"] = None
                return repeats, match[2].strip(), FOLDER_WORDS
        return 1, self.source.class_tokens, CLASS_TOKENS

    def _image(self, name: str, stem: str, place: "_Place") -> None:
        folder, repeats = place.folder, place.repeats
        path = folder.name(name)
        known = self._known(path, folder.files[name], image=True)
        texts: dict[str, str] = {}
        entry = None
        if place.above is not None:
            prefix, entries = place.above
            if (entry := entries.get(names.same(prefix + name))) is None:
                raise Unusable("not listed: the list above it says nothing of it")
        beside = self._beside(name, stem, place)
        if entry is not None:
            if entry.caption and beside and beside[1] != entry.caption:
                raise Unusable(f"two captions: {entry.where} and {beside[0]} differ")
            texts = dict(entry.texts)
            if entry.attributes:
                texts["attributes"] = json.dumps(entry.attributes)
            # A list says how often; where it is silent, the folder's name does.
            repeats = entry.repeats if entry.where.lower().startswith(MANIFEST) else repeats
        caption, texts["origin"] = self._caption(name, stem, place, entry, beside)
        if self.source.needs_trigger and not captions.says(caption, self.source.captions.trigger):
            raise Unusable(f"no trigger: its caption lacks {self.source.captions.trigger!r}")
        texts["class"], texts["leaf"] = _class_of(folder, texts)
        texts.setdefault("concept", place.concept)
        if self.source.masks == "files":
            texts["mask"] = self._mask(stem, place)
        repeats = repeats if self.source.repeats is None else self.source.repeats
        if repeats == 0:
            raise Unusable("0 repeats: so its list or folder asks")
        self.rows.add(
            (self.number, known.width, known.height, repeats),
            known.digest,
            file=path,
            caption=caption,
            **texts,
        )

    def _caption(
        self,
        name: str,
        stem: str,
        place: "_Place",
        entry: Listed | None,
        beside: tuple[str, str] | None,
    ) -> tuple[str, str]:
        """An image's caption, and where it is from."""
        if entry is not None and entry.caption:
            return entry.caption, entry.where
        if beside is not None:
            return beside[1], beside[0]
        by_name = place.by_name
        unread = [
            other
            for suffix in sorted(USUAL - set(self._extensions))
            for start in (stem, names.same(name))
            for other in by_name.get(start + suffix, ())
        ]
        if not place.words:
            wanted = " or ".join(f"{splitext(name)[0]}{end}" for end in self.source.extensions)
            more = f" ({unread[0]} is none by its suffix)" if unread else ""
            raise Unusable(f"no caption: write one in {wanted}{more}")
        if unread:
            self._count(
                f"images have such words as caption though a {splitext(unread[0])[1]} file lies "
                f"beside them: captions are in {' and '.join(self.source.extensions)} files",
                place.folder.name(unread[0]),
            )
        return place.words, place.words_from

    def _known(self, path: str, stamp: Stamp, *, image: bool) -> Known:
        full = f"{self.root}/{path}"
        known = self.memo.find(full, stamp)
        if known is None:
            try:
                if image and stamp.size > headers.MAX_BYTES:
                    raise Unusable(f"file too large: more than {headers.MAX_BYTES:,} bytes")
                known = (
                    Known(*headers.header(Path(full)))
                    if image
                    else Known(text=captions.read(Path(full)))
                )
            except Unusable as reason:
                known = Known(problem=str(reason))
            self.memo.learn(full, stamp, known)
        if known.problem:
            raise Unusable(known.problem)
        return known

    def _above(self, folder: Folder) -> Above:
        """The nearest list above a folder, and the folder's path from there."""
        parts = PurePosixPath(names.composed(folder.path)).parts
        for depth in range(len(parts), -1, -1):
            if (where := "/".join(parts[:depth])) in self.lists:
                return "".join(f"{part}/" for part in parts[depth:]), self.lists[where]
        return None

    def _beside(self, name: str, stem: str, place: "_Place") -> tuple[str, str] | None:
        """The file that holds an image's caption, 1.txt or 1.png.txt, and the caption."""
        folder = place.folder
        files = [
            file
            for suffix in self._extensions
            for start in (stem, names.same(name))
            for file in place.by_name.get(start + suffix, ())
        ]
        found = []
        for file in files:
            text = self._known(folder.name(file), folder.files[file], image=False).text
            found.append((file, captions.chosen(text, self.source.lines, file)))
            if captions.several_lines(text):
                self._several_lines(folder.name(file))
        if len({text for _, text in found}) > 1:
            raise Unusable(f"two captions: {' and '.join(file for file, _ in found)} differ")
        return found[0] if found else None

    def _several_lines(self, path: str) -> None:
        if self.source.lines == "first":
            self._count("caption files have several lines, of which the first is used", path)
        else:
            self._count(
                "caption files have several lines, all of which are used; of the first alone with "
                "data.caption_lines=first",
                path,
            )

    def _mask(self, stem: str, place: "_Place") -> str:
        """The path of an image's mask; "" where all of it counts."""
        found = place.masks.get(stem, [])
        if len(found) > 1:
            raise Unusable(f"two masks: {' and '.join(found)}")
        return place.folder.name(found[0]) if found else ""


@dataclass(frozen=True)
class _Place:
    """What the images of one folder have in common."""

    folder: Folder
    by_name: dict[str, list[str]]  # its files, by `names.same`
    masks: dict[str, list[str]]  # by stem
    above: Above  # the list that names them
    concept: str
    repeats: int
    words: str  # for images without a caption
    words_from: str


def _concept(folder: Folder) -> str:
    """What the images in a folder are of, by its name."""
    return class_folders.unnumbered(PurePosixPath(folder.path).name)


def _class_of(folder: Folder, listed: Mapping[str, str]) -> tuple[str, str]:
    """Class and sub-class of an image: a list's word for it, else its folder's."""
    above, leaf = class_folders.place(folder.path)
    if concept := listed.get("concept"):
        return concept, listed.get("subclass", "")
    if subclass := listed.get("subclass"):
        return "/".join(filter(None, (above, leaf))), subclass
    return above, leaf


def chunks(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
