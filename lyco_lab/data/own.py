"""Pictures of the user's own: from a run's settings to the samples that it is trained on.

    sources -> index -> sizes -> checked -> samples

Whatever is left out on the way is named, with the reason. By default that is an error, as a study
of other images than its author meant is worth little; `data.bad_files: drop` goes on without them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lyco_lab.config import Data
from lyco_lab.data import concepts, sdscripts
from lyco_lab.data.buckets import Sizing, shown
from lyco_lab.data.captions import Captions
from lyco_lab.data.check import check
from lyco_lab.data.concepts import Concept
from lyco_lab.data.folder import Dataset, Item
from lyco_lab.data.index import Index, build
from lyco_lab.data.listing import TEXTS
from lyco_lab.data.memo import Memo
from lyco_lab.data.sources import EXTENSIONS, Source
from lyco_lab.data.stored import Samples
from lyco_lab.errors import UserError, one_line

TABLE = "images.csv"  # in the run's folder, a line for every file
MUCH = 1 / 3  # of an image cut away is worth a word
SHARE = Fraction(1, 2)  # of prior images, as in DreamBooth


def sources_of(data: Data, batch_size: int) -> tuple[Source, ...]:
    """Where a run's images come from."""
    if data.toml is not None:
        return _from_toml(data, Path(data.toml), batch_size)
    assert data.folder is not None
    captions = Captions(
        shuffle=data.shuffle_tags,
        keep_tags=data.keep_tags,
        separator=data.tag_separator,
        tag_dropout=data.tag_dropout,
        trigger=data.trigger or "",
        prefix=data.prefix,
        suffix=data.suffix,
    )
    extensions = EXTENSIONS if data.caption_extension is None else (data.caption_extension,)
    ours = Source(
        Path(data.folder),
        repeats=data.repeats,
        extensions=extensions,
        captions=captions,
        needs_trigger=data.trigger_rule == "keep",
        flip=data.flip,
        masks=data.masks,
        lines=data.caption_lines,
    )
    if data.prior is None:
        return (ours,)
    # A prior image shows the class, not the concept: it has no trigger, and counts as a whole.
    plain = Captions(captions.shuffle, captions.keep_tags, captions.separator, captions.tag_dropout)
    prior = Source(
        Path(data.prior),
        prior=True,
        extensions=extensions,
        captions=plain,
        flip=data.flip,
        lines=data.caption_lines,
    )
    return ours, prior


def _from_toml(data: Data, path: Path, batch_size: int) -> tuple[Source, ...]:
    found = sdscripts.read(path)
    if found.dropped:
        raise UserError(
            f"{path} asks for what is not supported: {'; '.join(found.dropped)}; remove "
            f"{'it' if len(found.dropped) == 1 else 'these'} to go on without"
        )
    if found.batch_size is not None and found.batch_size != batch_size:
        raise UserError(
            f"train.batch_size is {batch_size}, but {path} says batch_size = {found.batch_size}: "
            "make them equal, or remove the latter"
        )
    has_prior = any(source.prior for source in found.sources)
    for key in ("prior_share", "prior_weight"):
        if getattr(data, key) is not None and not has_prior:
            raise UserError(
                f"data.{key} is {getattr(data, key)!r}, but no subset of {path} has is_reg = true"
            )
    return found.sources


def index_of(data: Data, batch_size: int, side: int, memo: Memo) -> tuple[Index, NDArray[np.int32]]:
    """The images that can be used, and the size (N, 2) at which each is trained."""
    index = build(sources_of(data, batch_size), memo)
    default = _default(data, side)
    sizes_N2 = np.zeros((len(index), 2), np.int32)
    small: dict[int, str] = {}
    for number, source in enumerate(index.sources):
        sizing = source.sizing or default
        rows = np.flatnonzero(index.source_N == number)
        sizes_N2[rows] = sizing.assign(index.width_N[rows], index.height_N[rows])
        for row in rows[sizes_N2[rows, 0] == 0].tolist():
            size = f"{index.width_N[row]} x {index.height_N[row]}"
            small[row] = f"too small: {size} pixels, and data.upscale is false"
    kept = np.array([i for i in range(len(index)) if i not in small], np.int64)
    index, sizes_N2 = (index.drop(small), sizes_N2[kept]) if small else (index, sizes_N2)
    if data.limit is not None:
        ours = np.flatnonzero(~index.prior_N)[: data.limit]
        kept = np.sort(np.concatenate([ours, np.flatnonzero(index.prior_N)]))
        index, sizes_N2 = index.select(kept), sizes_N2[kept]
    if data.balance == "classes":
        index = index.balanced()
    return index, sizes_N2


def _default(data: Data, side: int) -> Sizing:
    side = data.resolution or side
    try:
        return Sizing(side, side, data.buckets, data.upscale)
    except UserError as error:
        raise UserError(f"data.resolution is {data.resolution}: {error}") from error


def judge(index: Index, data: Data, table: Path | None = None) -> None:
    """Nothing to train on is an error, and so is what had to be left out unless allowed.

    `table`: where the whole list is written, and is pointed to.
    """
    place = data.folder or data.toml
    more = f"; all of them are in {table}" if table is not None else ""
    if index.dropped and data.bad_files == "error":
        first = [one_line(text) for text in index.dropped[0]]
        raise UserError(
            f"{len(index.dropped)} of the {len(index) + len(index.dropped)} images of {place} "
            f"cannot be used, as {first[0]} ({first[1]}): mend or remove them, or leave them "
            f"out with data.bad_files=drop{more}"
        )
    if not (~index.prior_N).any():
        why = "".join(f", {count} {reason}" for reason, count in index.reasons().most_common())
        raise UserError(
            f"no images in {place}: it needs .png, .jpg, .webp or .bmp files, each with a caption "
            f"in a text file of the same name or in a list{why}{more}"
        )


def report(index: Index, sizes_N2: NDArray[np.int32]) -> list[str]:
    """What was found, used and left out, and the sizes images are trained at."""
    lines = index.report()
    sizes, counts = np.unique(sizes_N2, axis=0, return_counts=True)
    lines.append("sizes: " + ", ".join(
        f"{w} x {h}: {count}" for (w, h), count in zip(sizes.tolist(), counts, strict=True)
    ))  # fmt: skip
    left = np.array(
        [
            shown(int(w), int(h), (int(size[0]), int(size[1])))
            for w, h, size in zip(index.width_N, index.height_N, sizes_N2, strict=True)
        ]
    )
    if len(left) and (cut := int((left < 1 - MUCH).sum())):
        worst = int(left.argmin())
        lines.append(
            f"  {cut} images lose more than a third to cutting; most, {1 - left[worst]:.0%}, "
            f"{index.file(worst)}"
        )
    parts = (index.texts[name].to_pylist() for name in ("class", "leaf"))
    classes = ["/".join(filter(None, names)) for names in zip(*parts, strict=True)]
    if 1 < len(set(classes)) <= 64:
        samples: dict[str, int] = {}
        for name, repeats in zip(classes, index.repeats_N.tolist(), strict=True):
            samples[name] = samples.get(name, 0) + repeats
        lines.append(
            "samples per epoch: " + ", ".join(f"{n or 'others'} {c}" for n, c in samples.items())
        )
    return lines


def samples_of(
    data: Data, batch_size: int, side: int, memo: Memo, table: Path | None = None
) -> Samples:
    """All that is shown, every image read once."""
    index, sizes_N2 = index_of(data, batch_size, side, memo)
    index, digests, kept = check(index, memo)
    sizes_N2 = sizes_N2[kept]
    if table is not None:
        index.write(table)
    judge(index, data, table)
    rows_E = np.arange(len(index), dtype=np.int64)
    share = Fraction(0)
    if index.prior_N.any():
        given = data.prior_share
        share = SHARE if given is None else Fraction(given).limit_denominator(1000)
        extra, extra_sizes = _lent(index, sizes_N2, share, data.upscale)
        rows_E = np.concatenate([rows_E, extra])
        sizes_N2 = np.concatenate([sizes_N2, extra_sizes])
    elif any(source.prior for source in index.sources):
        raise UserError("no prior image is left: see above for the reasons")
    weight = 1.0 if data.prior_weight is None else data.prior_weight
    return Samples(index, rows_E, sizes_N2, digests, share, weight)


def _lent(
    index: Index, sizes_N2: NDArray[np.int32], share: Fraction, upscale: bool
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Prior images for sizes that have images and no prior ones: those of the nearest aspect.

    As many as their places in an epoch, or all there are.
    """
    prior_N = index.prior_N
    rows: list[int] = []
    sizes: list[tuple[int, int]] = []
    have = {tuple(size) for size in sizes_N2[prior_N].tolist()}
    for size in sorted({tuple(size) for size in sizes_N2[~prior_N].tolist()} - have):
        here = (sizes_N2 == size).all(1) & ~prior_N
        need = -(-int(index.repeats_N[here].sum()) * share // (1 - share))
        fits = [
            i
            for i in np.flatnonzero(prior_N).tolist()
            if upscale or (index.width_N[i] >= size[0] and index.height_N[i] >= size[1])
        ]
        if not fits:
            raise UserError(
                f"images are trained at {size[0]} x {size[1]} pixels, and no prior image is that "
                "large: add one, or enlarge smaller ones with data.upscale=true"
            )
        fits.sort(key=lambda i: (-shown(int(index.width_N[i]), int(index.height_N[i]), size), i))
        chosen = fits[: max(1, int(need))]
        rows += chosen
        sizes += [size] * len(chosen)
    return np.array(rows, np.int64), np.array(sizes, np.int32).reshape(-1, 2)


class Items(Sequence[Item]):
    """The images that are not prior ones, as items that are made when they are asked for."""

    def __init__(self, index: Index, title: str) -> None:
        self.of = index
        self.rows = np.flatnonzero(~index.prior_N)
        every = index.captions()
        self.captions = [every[row] for row in self.rows]
        self.title = title

    @cached_property
    def concepts(self) -> tuple[Concept, ...]:
        return concepts.find(self.of, self.rows.tolist(), self.captions, self.title)

    @cached_property
    def _concept_of(self) -> dict[int, Concept]:
        return {i: each for each in self.concepts for i in each.rows}

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        row = int(self.rows[place])
        texts: dict[str, Any] = {name: self.of.text(name, row) for name in TEXTS}
        found = self._concept_of[range(len(self))[place]]
        if not texts["trigger"] and found.trigger:
            texts |= {"trigger": found.trigger, "class_word": found.class_word}
        return Item(
            self.of.file(row),
            self.captions[place],
            int(self.of.repeats_N[row]),
            attributes=json.loads(self.of.text("attributes", row) or "{}"),
            **texts,
        )


@dataclass(frozen=True)
class OwnDataset(Dataset):
    """A user's images, as evaluation and reports go through them; prior ones are no part.

    `cache`: the folder of what the models say of them.
    """

    samples: Samples
    cache: Path
    items: Items

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return self.items.concepts

    @property
    def captions(self) -> list[str]:
        captions = self.samples.index.captions()
        return [captions[row] for row in self._rows]

    @property
    def repeats(self) -> tuple[int, ...]:
        return tuple(self.samples.index.repeats_N[self._rows].tolist())

    @property
    def _rows(self) -> NDArray[np.int64]:
        return np.flatnonzero(~self.samples.index.prior_N)


def dataset_of(samples: Samples, folder: Path, cache: Path) -> OwnDataset:
    return OwnDataset(folder, Items(samples.index, folder.resolve().name), samples, cache)
