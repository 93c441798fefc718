"""Which images there are, in columns: found, looked at and judged, without decoding a pixel.

Every file below a source's folder ends in one of three ways: *used*; *dropped*, with the reason; or
*other*, not an image at all. Nothing is passed over in silence: `report` counts all of them, and
`write` lists each. What a file says is read once and remembered under its stamp (memo.py), so that
a second look costs only the walk through the folders.

A caption comes from, in this order: manifest.jsonl or metadata.jsonl in the image's folder or above
it; a text file beside it, of the same name; the words of a folder N_CONCEPT. Two that differ are a
reason to drop the image, as neither is known to be meant.
"""

import csv
import hashlib
import json
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import splitext
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lyco_lab.data import captions, concepts, headers, listing
from lyco_lab.data.concepts import NUMBERED
from lyco_lab.data.headers import FORMATS, OTHER_FORMATS, Unusable
from lyco_lab.data.listing import MANIFEST, METADATA, Listed
from lyco_lab.data.memo import Known, Memo
from lyco_lab.data.scan import Folder, Lost, Stamp, walk
from lyco_lab.data.sources import MASK_FOLDER, MASK_SUFFIX, Source
from lyco_lab.errors import UserError
from lyco_lab.files import atomic

SAVE_EVERY_S = 10.0  # a look at many files that is stopped loses no more than this
# "class" and "leaf": the concept that an image is of and its sub-class, as lists or folders say.
TEXTS = ("file", "caption", "mask", "attributes", *listing.TEXTS, "class", "leaf")
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
            lines.append(f"  dropped, {reason}: {count} (the first: {first.path})")
        if self.other:
            kinds = Counter(why.partition(":")[0] for _, why in self.other)
            said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            lines.append(f"  not images: {said}")
        return [*lines, *(f"  {remark}" for remark in self.remarks)]

    def write(self, path: Path) -> None:
        """A CSV file with a line for every file."""
        with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["file", "status", "reason", "width", "height", "repeats", "caption"])
            for i in range(len(self)):
                size = (int(self.width_N[i]), int(self.height_N[i]), int(self.repeats_N[i]))
                table.writerow([self.file(i), "used", "", *size, self.text("caption", i)])
            for status, losses in (("dropped", self.dropped), ("other", self.other)):
                for lost in losses:
                    table.writerow([lost.path, status, lost.reason, "", "", "", ""])


def build(sources: Sequence[Source], memo: Memo) -> Index:
    """All images of some sources. What is learned of files goes to the memo, and is saved."""
    rows, dropped, other, remarks = _Rows(), list[Lost](), list[Lost](), dict[str, None]()
    with headers.strict():
        for number, source in enumerate(sources):
            if not source.folder.is_dir():
                raise UserError(f"the folder of images {source.folder} does not exist")
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
            (self._drop if image and "hidden" not in reason else self._other)(path, reason)
        for where, images in self.lists.items():
            for name in images:
                path = f"{where}/{name}" if where else name
                if path not in listed_seen:
                    self._drop(path, f"listed and missing: {images[name].where} names it")

    def _drop(self, path: str, reason: str) -> None:
        self.dropped.append(Lost(f"{self.root}/{path}", reason))

    def _other(self, path: str, kind: str) -> None:
        self.other.append(Lost(f"{self.root}/{path}", kind))

    def _lists(self, folder: Folder) -> None:
        found = [name for name in (MANIFEST, METADATA) if name in folder.files]
        where = self.source.folder / folder.path
        if len(found) > 1:
            raise UserError(f"{where} holds {MANIFEST} and {METADATA}: keep one of them")
        if not found:
            return
        read = listing.read(where / found[0])
        self.lists[folder.path] = read.images
        for name in read.twice:
            self._drop(folder.name(name), f"listed twice: the first line of {found[0]} counts")
        if read.unused:
            self.remarks[f"{read.path}: columns not used: {', '.join(read.unused)}"] = None

    def _images(self, folder: Folder, seen: set[str]) -> None:
        stems: dict[str, list[str]] = {}
        for name in folder.files:
            stem, suffix = splitext(name)
            if suffix.lower() in FORMATS and not self._is_mask(name):
                stems.setdefault(stem, []).append(name)
        for name in folder.files:
            self._file(name, folder, stems)
        repeats, words = self._numbered(folder)
        above, concept = self._above(folder), _concept(folder)
        for stem, names in stems.items():
            for name in names:
                path = folder.name(name)
                seen.add(path)
                if len(names) > 1:
                    others = ", ".join(other for other in names if other != name)
                    self._drop(path, f"name used twice: {others} lies beside it")
                    continue
                try:
                    self._image(name, stem, folder, above, concept, repeats, words)
                except Unusable as reason:
                    self._drop(path, str(reason))
        if time.monotonic() - self.saved_s > SAVE_EVERY_S:
            self.memo.save()
            self.saved_s = time.monotonic()

    def _is_mask(self, name: str) -> bool:
        return self.source.masks == "files" and name.endswith(MASK_SUFFIX)

    def _file(self, name: str, folder: Folder, stems: dict[str, list[str]]) -> None:
        """A file that is no image of a format that is read."""
        stem, suffix = splitext(name)
        suffix = suffix.lower()
        if suffix in OTHER_FORMATS:
            self._drop(folder.name(name), f"format not supported: {suffix}")
        elif suffix in self.source.extensions:
            if stem not in stems:
                self._other(folder.name(name), "captions without an image")
        elif suffix not in FORMATS and name not in (MANIFEST, METADATA):
            kind = f"{suffix} files" if suffix else "files without a suffix"
            self._other(folder.name(name), kind)

    def _numbered(self, folder: Folder) -> tuple[int, str]:
        """Repeats and words of the innermost folder N_CONCEPT around."""
        if not self.source.numbered:
            return 1, self.source.class_tokens
        root = self.source.folder.resolve().name
        for part in reversed([root, *PurePosixPath(folder.path).parts]):
            if match := NUMBERED.fullmatch(part):
                repeats = int(match[1])
                if repeats and self.source.repeats is None and folder.files:
                    self.remarks[f"{part}: {repeats} repeats, as the folder's name says"] = None
                return repeats, match[2].strip()
        return 1, self.source.class_tokens

    def _image(
        self,
        name: str,
        stem: str,
        folder: Folder,
        above: Above,
        concept: str,
        repeats: int,
        words: str,
    ) -> None:
        path = folder.name(name)
        known = self._known(path, folder.files[name], image=True)
        texts: dict[str, str] = {}
        entry = None
        if above is not None:
            prefix, entries = above
            if (entry := entries.get(prefix + name)) is None:
                raise Unusable("not listed: the list above it says nothing of it")
        beside = self._beside(stem, folder)
        if entry is not None:
            if entry.caption and beside and beside[1] != entry.caption:
                raise Unusable(f"two captions: {entry.where} and {beside[0]} differ")
            texts = dict(entry.texts)
            if entry.attributes:
                texts["attributes"] = json.dumps(entry.attributes)
            # A list says how often; where it is silent, the folder's name does.
            repeats = entry.repeats if entry.where.startswith(MANIFEST) else repeats
        caption = (entry.caption if entry else "") or (beside[1] if beside else "") or words
        if not caption:
            wanted = " or ".join(f"{stem}{suffix}" for suffix in self.source.extensions)
            raise Unusable(f"no caption: write one in {wanted}")
        if self.source.needs_trigger and not captions.says(caption, self.source.captions.trigger):
            raise Unusable(f"no trigger: its caption lacks {self.source.captions.trigger!r}")
        texts["class"], texts["leaf"] = _class_of(folder, texts)
        texts.setdefault("concept", concept)
        if self.source.masks == "files":
            texts["mask"] = self._mask(stem, folder)
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

    def _known(self, path: str, stamp: Stamp, *, image: bool) -> Known:
        full = f"{self.root}/{path}"
        known = self.memo.find(full, stamp)
        if known is None:
            try:
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
        parts = PurePosixPath(folder.path).parts
        for depth in range(len(parts), -1, -1):
            if (where := "/".join(parts[:depth])) in self.lists:
                return "".join(f"{part}/" for part in parts[depth:]), self.lists[where]
        return None

    def _beside(self, stem: str, folder: Folder) -> tuple[str, str] | None:
        """The caption in a text file, and the file's name."""
        found = [
            (name, self._known(folder.name(name), folder.files[name], image=False).text)
            for suffix in self.source.extensions
            if (name := f"{stem}{suffix}") in folder.files
        ]
        if len({text for _, text in found}) > 1:
            raise Unusable(f"two captions: {' and '.join(name for name, _ in found)} differ")
        return found[0] if found else None

    def _mask(self, stem: str, folder: Folder) -> str:
        """The path of an image's mask; "" where all of it counts."""
        below = self.source.folder / folder.path / MASK_FOLDER / f"{stem}.png"
        beside = f"{stem}{MASK_SUFFIX}"
        if beside in folder.files:
            if below.is_file():
                raise Unusable(f"two masks: {beside} and {MASK_FOLDER}/{below.name}")
            return folder.name(beside)
        return folder.name(f"{MASK_FOLDER}/{below.name}") if below.is_file() else ""


def _concept(folder: Folder) -> str:
    """What the images in a folder are of, by its name."""
    return concepts.unnumbered(PurePosixPath(folder.path).name)


def _class_of(folder: Folder, listed: Mapping[str, str]) -> tuple[str, str]:
    """Class and sub-class of an image: a list's word for it, else its folder's."""
    above, leaf = concepts.place(folder.path)
    if concept := listed.get("concept"):
        return concept, listed.get("subclass", "")
    if subclass := listed.get("subclass"):
        return "/".join(filter(None, (above, leaf))), subclass
    return above, leaf


def chunks(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
