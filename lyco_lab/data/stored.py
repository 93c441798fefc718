"""Images and captions of any number as training reads them: from disk, whatever fits or not.

    CACHE/latents/WxH/    what the VAE says of an image: mean, deviation, mask
    CACHE/text/           what the text encoders say of a caption, where they are frozen

A latent's key is a digest of the image's bytes, its mask's, the VAE, the size, the cut, the flip
and the precision; a text's of the caption and the text encoders. So neither can be out of date, a
file that was touched, moved or copied keeps its latents, and one that was edited gets new ones. The
cache is shared by all runs beside it. What is dropped or shuffled is drawn in each step and never
stored: captions whose tags are drawn are read by the text encoders in each step instead, which
costs about a hundredth of it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lyco_lab.data import fingerprint, pixels
from lyco_lab.data.buckets import fit
from lyco_lab.data.cache import Pictures, Spread
from lyco_lab.data.captions import rng as caption_rng
from lyco_lab.data.index import Index, chunks
from lyco_lab.data.order import Order
from lyco_lab.data.pixels import Picture
from lyco_lab.data.room import ROOM
from lyco_lab.data.shards import Damaged, Keys, Shards, key
from lyco_lab.diffusion.model import Diffusion, Sizes
from lyco_lab.errors import UserError
from lyco_lab.files import atomic, locked, seal
from lyco_lab.progress import Bar
from lyco_lab.readers import read_sealed
from lyco_lab.workers import cores

VERSION = 1  # of what keys stand for: another rule of cutting needs another number
ENCODED = 16  # images, or captions, that a model is given at once
SHARD_BYTES = 2**25
SHARD_ROWS = 256
SHARD_S = 60.0  # a shard is written after this long, so that a stop loses no more
PRECISIONS = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class Samples:
    """What is shown: entries, each an image at a size. An image can have two where it is prior."""

    index: Index
    rows_E: NDArray[np.int64]  # of the index
    sizes_E2: NDArray[np.int32]  # width, height
    digests: Sequence[bytes]  # of the index's images
    prior_share: Fraction = Fraction(0)
    prior_weight: float = 1.0

    def __len__(self) -> int:
        return len(self.rows_E)

    @property
    def prior_E(self) -> NDArray[np.bool_]:
        return self.index.prior_N[self.rows_E]

    def order(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Order:
        w_E, h_E = self.sizes_E2.astype(np.int64).T
        return Order(
            self.index.repeats_N[self.rows_E].astype(np.int64),
            batch_size,
            seed,
            rank,
            ranks,
            buckets=w_E * 2**20 + h_E,
            prior=self.prior_E,
            prior_share=self.prior_share,
        )


@dataclass
class Stored:
    """All that training reads of some samples.

    `cached`: whether latents are kept; else images are encoded in each step, with `random_crop`
    each time cut at another place. `text_states`: whether the text encoders are frozen.
    """

    samples: Samples
    diffusion: Diffusion
    folder: Path
    text_states: bool
    cached: bool = True
    random_crop: bool = False
    precision: str = "fp32"
    cut_captions: int = 0  # how many are longer than the text encoders read
    _shards: dict[str, Shards] = field(default_factory=dict)
    _places: dict[str, NDArray[np.int32]] = field(default_factory=dict)

    @property
    def index(self) -> Index:
        return self.samples.index

    def order(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Order:
        return self.samples.order(batch_size, seed, rank, ranks)

    # What is there

    @cached_property
    def cell(self) -> int:
        """Pixels of a latent's side."""
        return int(2 ** (len(self.diffusion.vae.config.block_out_channels) - 1))

    @cached_property
    def flips(self) -> bool:
        return any(source.flip for source in self.index.sources)

    @cached_property
    def masked(self) -> bool:
        return any(source.masks for source in self.index.sources)

    @cached_property
    def drawn(self) -> bool:
        """Whether tags are drawn in each step."""
        return any(source.captions.drawn for source in self.index.sources)

    @property
    def keeps_text(self) -> bool:
        return self.text_states and not self.drawn

    @cached_property
    def vae_print(self) -> bytes:
        return fingerprint.weights(self.diffusion.vae)

    @cached_property
    def text_print(self) -> str:
        """Of all that decides what a caption's text states are."""
        parts = [name for name in self.diffusion.parts if name.startswith("text_encoder")]
        prints = [fingerprint.weights(self.diffusion.parts[name]).hex() for name in parts]
        found = [fingerprint.tokenizer(t).hex() for t in self.diffusion.tokenizers.values()]
        plain = {
            name: value
            for name, value in vars(self.diffusion).items()
            if isinstance(value, int | float | str | bool)
        }
        return key(type(self.diffusion).__name__, prints, found, plain).hex()

    def latent_keys(self, flip: bool) -> list[bytes]:
        """Of each entry."""
        makers = [
            Keys(
                VERSION,
                source.masks,
                self.vae_print,
                "middle",
                flip and source.flip,
                self.precision,
            )
            for source in self.index.sources
        ]
        rows = self.samples.rows_E
        sources, sizes = self.index.source_N[rows].tolist(), self.samples.sizes_E2.astype("<i4")
        digests = self.samples.digests
        return [
            makers[source](digests[row] + size.tobytes())
            for source, row, size in zip(sources, rows.tolist(), sizes, strict=True)
        ]

    @cached_property
    def captions(self) -> list[str]:
        """All captions that differ, and last the empty one; as they are where nothing is drawn."""
        return [*dict.fromkeys(self.index.captions()), ""]

    @cached_property
    def caption_N(self) -> NDArray[np.int64]:
        """Of each image, the place of its caption."""
        places = {caption: i for i, caption in enumerate(self.captions[:-1])}
        return np.array([places[caption] for caption in self.index.captions()], np.int64)

    # Building

    def build(self) -> "Stored":
        """Encode what is missing; what is there already is not read."""
        with locked(self.folder):
            if self.cached:
                for flip in (False, True)[: 1 + self.flips]:
                    self._build_latents(flip)
            if self.keeps_text:
                self._build_texts()
            self.cut_captions = self._count_cut()
        damaged = sum(shards.damaged for shards in self._shards.values())
        if damaged:
            print(f"{damaged} files of the cache in {self.folder} were damaged, and made anew")
        return self

    def _open(self, name: str) -> Shards:
        if name not in self._shards:
            self._shards[name] = Shards(self.folder / name)
        return self._shards[name]

    def _build_latents(self, flip: bool) -> None:
        keys = self.latent_keys(flip)
        places_E2 = np.full((len(self.samples), 2), -1, np.int32)
        missing = []
        sizes, size_E = np.unique(self.samples.sizes_E2, axis=0, return_inverse=True)
        groups = {
            _name(size): np.flatnonzero(size_E.reshape(-1) == number)
            for number, size in enumerate(sizes.tolist())
        }
        for name, here in groups.items():
            places_E2[here] = self._open(name).places([keys[e] for e in here])
            lacking = here[places_E2[here, 0] < 0]
            # Copies of an image share one row.
            first = {keys[e]: int(e) for e in reversed(lacking.tolist())}
            missing.append((name, sorted(first.values())))
        total = sum(len(entries) for _, entries in missing)
        if total:
            title = "latents of mirrored images" if flip else "latents"
            with Bar(title, total) as bar:
                for name, entries in missing:
                    self._encode(name, entries, flip, keys, bar)
            for name, here in groups.items():
                places_E2[here] = self._open(name).places([keys[e] for e in here])
        self._places["flipped" if flip else "latents"] = places_E2

    def _encode(
        self, name: str, entries: list[int], flip: bool, keys: Sequence[bytes], bar: Bar
    ) -> None:
        """Write the latents of images of one size."""
        if not entries:
            return
        width, height = self.samples.sizes_E2[entries[0]].tolist()
        row_bytes = 2 * 4 * (width // self.cell) * (height // self.cell) * 4
        most = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
        most += -most % ENCODED  # the same images are encoded together when one is made anew
        gathered: list[dict[str, NDArray[Any]]] = []
        names: list[bytes] = []
        began_s = time.monotonic()
        for batch, pictures in self._read_ahead(entries, flip):
            gathered.append(self._encoded(batch, pictures))
            names += [keys[e] for e in batch]
            for _ in batch:
                bar.advance()
            if len(names) >= most or time.monotonic() - began_s > SHARD_S:
                self._open(name).write(names, _joined(gathered))
                gathered, names, began_s = [], [], time.monotonic()
        if names:
            self._open(name).write(names, _joined(gathered))

    def _read_ahead(
        self, entries: list[int], flip: bool
    ) -> Iterator[tuple[list[int], list[Picture]]]:
        """Batches of images; the next is decoded by threads while one is encoded."""
        batches = [[entries[i] for i in rows] for rows in chunks(len(entries), ENCODED)]

        def start(batch: list[int]) -> list[Any]:
            return [pool.submit(self._picture, e, flip) for e in batch]

        with ThreadPoolExecutor(cores()) as pool:
            waiting = start(batches[0])
            for i, batch in enumerate(batches):
                following = start(batches[i + 1]) if i + 1 < len(batches) else []
                yield batch, [one.result() for one in waiting]
                waiting = following

    def _picture(self, entry: int, flip: bool, at: tuple[float, float] | None = None) -> Picture:
        row = int(self.samples.rows_E[entry])
        source = self.index.sources[self.index.source_N[row]]
        mask = self.index.text("mask", row) if source.masks == "files" else ""
        width, height = int(self.index.width_N[row]), int(self.index.height_N[row])
        with ROOM.of(width * height):
            return pixels.read(
                self.index.file(row),
                (width, height),
                (int(self.samples.sizes_E2[entry, 0]), int(self.samples.sizes_E2[entry, 1])),
                flip=flip and source.flip,
                masks=source.masks,
                mask=source.folder / mask if mask else None,
                at=at,
                cell=self.cell,
            )

    def _encoded(
        self, entries: Sequence[int], pictures: Sequence[Picture]
    ) -> dict[str, NDArray[Any]]:
        found = self.diffusion.encode_images(np.stack([p.pixels_HWC for p in pictures]), ENCODED)
        mean, std = found.mean_NCHW.cpu(), found.std_NCHW.cpu()
        rows: dict[str, NDArray[Any]] = {}
        dtype = PRECISIONS[self.precision]
        for name, values in (("mean", mean), ("std", std)):
            rows[name] = values.float().numpy().astype(dtype)
            finite = np.isfinite(rows[name]).reshape(len(entries), -1).all(1)
            if not finite.all():
                bad = entries[int(np.flatnonzero(~finite)[0])]
                raise UserError(
                    f"the VAE gives a latent of {self.index.file(self.samples.rows_E[bad])} that "
                    f"is not finite in {self.precision}: check the model"
                )
        if self.masked:
            h, w = mean.shape[-2:]
            whole = np.full((h, w), 255, np.uint8)
            masks = [whole if p.mask_hw is None else p.mask_hw for p in pictures]
            rows["mask"] = np.stack(masks)
        return rows

    def _build_texts(self) -> None:
        shards = self._open("text")
        maker = Keys(VERSION, self.text_print)
        keys = [maker(caption.encode()) for caption in self.captions]
        places = shards.places(keys)
        missing = np.flatnonzero(places[:, 0] < 0).tolist()
        if missing:
            with Bar("text states", len(missing)) as bar:
                gathered: list[dict[str, NDArray[Any]]] = []
                names: list[bytes] = []
                for rows in chunks(len(missing), ENCODED):
                    batch = [missing[i] for i in rows]
                    gathered.append(self._texts_of([self.captions[i] for i in batch]))
                    names += [keys[i] for i in batch]
                    for _ in batch:
                        bar.advance()
                    size = sum(array.nbytes for rows_ in gathered for array in rows_.values())
                    if size > SHARD_BYTES or len(names) >= SHARD_ROWS:
                        shards.write(names, _joined(gathered))
                        gathered, names = [], []
                if names:
                    shards.write(names, _joined(gathered))
            places = shards.places(keys)
        self._places["text"] = places

    def _count_cut(self) -> int:
        """Captions longer than the text encoders read; counted once for all runs beside."""
        prints = [fingerprint.tokenizer(t).hex() for t in self.diffusion.tokenizers.values()]
        name = key(self.captions, self.caption_N.tolist(), prints, self.diffusion.chunks)
        file = self.folder / "text" / f"cut-{name.hex()}.count"
        if file.exists():
            try:
                return int(bytes(read_sealed(file)))
            except UserError as error:
                print(f"{error}; captions are counted anew")
        cut = np.array([self.diffusion.too_long(caption) for caption in self.captions])
        count = int(cut[self.caption_N].sum())
        with atomic(file) as temporary:
            temporary.write_text(str(count))
            seal(temporary)
        return count

    def _texts_of(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        rows = self.diffusion.encode_text(captions)
        return {name: tensor.float().cpu().numpy() for name, tensor in rows.items()}

    # Reading

    def pictures(self, indices_B: Tensor, flip_B: Tensor, at_B2: Tensor) -> Pictures:
        """`flip_B`: which are mirrored; `at_B2`: where images are cut, if that is not the middle.

        Images of sources that ask for neither stay as they are.
        """
        entries = indices_B.tolist()
        rows = self.samples.rows_E[entries]
        flips = [
            bool(flip) and self.index.sources[self.index.source_N[row]].flip
            for flip, row in zip(flip_B.tolist(), rows, strict=True)
        ]
        if self.cached:
            found = [self._row(e, flip) for e, flip in zip(entries, flips, strict=True)]
            corners = [
                fit(*self._shape(e)).seen(flip) for e, flip in zip(entries, flips, strict=True)
            ]
        else:
            read = [
                self._picture(e, flip, (at[0], at[1]) if self.random_crop else None)
                for e, flip, at in zip(entries, flips, at_B2.tolist(), strict=True)
            ]
            encoded = self._encoded(entries, read)
            found = [{n: a[i] for n, a in encoded.items()} for i in range(len(entries))]
            corners = [picture.corner for picture in read]
        mean, std = (
            torch.from_numpy(np.stack([row[name] for row in found])).float()
            for name in ("mean", "std")
        )
        w_E, h_E = self.samples.sizes_E2[entries].T
        sizes = Sizes(
            original_N2=_pairs(self.index.height_N[rows], self.index.width_N[rows]),
            corner_N2=torch.tensor([(top, left) for left, top in corners]),
            target_N2=_pairs(h_E, w_E),
        )
        prior_B = None
        if self.samples.prior_share:
            prior_B = torch.from_numpy(self.samples.prior_E[entries])
        return Pictures(Spread(mean, std), sizes, self._weights(found, prior_B), prior_B)

    def _shape(self, entry: int) -> tuple[int, int, tuple[int, int]]:
        row = self.samples.rows_E[entry]
        width, height = self.samples.sizes_E2[entry].tolist()
        return int(self.index.width_N[row]), int(self.index.height_N[row]), (width, height)

    def _weights(
        self, found: Sequence[dict[str, NDArray[Any]]], prior_B: Tensor | None
    ) -> Tensor | None:
        weights = None
        if prior_B is not None:
            weights = torch.where(prior_B, self.samples.prior_weight, 1.0).view(-1, 1, 1, 1)
        if self.masked:
            whole = np.full(found[0]["mean"].shape[-2:], 255, np.uint8)
            rows = [row.get("mask", whole) for row in found]  # kept by a run without masks: none
            masks = torch.from_numpy(np.stack(rows))[:, None] / 255
            weights = masks if weights is None else weights * masks
        return weights

    def _row(self, entry: int, flip: bool) -> dict[str, NDArray[Any]]:
        which, shards = (
            "flipped" if flip else "latents",
            self._open(_name(self.samples.sizes_E2[entry].tolist())),
        )
        try:
            return shards.row(self._places[which][entry])
        except Damaged as damaged:
            shards.discard(damaged.shard)
        with locked(self.folder):
            # Its rows, of mirrored images or not, are all found missing.
            for again in (False, True)[: 1 + self.flips]:
                self._build_latents(again)
        print(f"a file of the cache in {self.folder} was damaged, and is made anew")
        return shards.row(self._places[which][entry])

    def texts(
        self, indices_B: Tensor, dropped_B: Tensor, seeds: Callable[[int], int]
    ) -> dict[str, Tensor]:
        """The rows of the captions; empty ones where they are dropped.

        `seeds`: of the draw of the caption at a place in the batch.
        """
        rows = self.samples.rows_E[indices_B.tolist()]
        dropped = dropped_B.tolist()
        if self.keeps_text:
            empty = len(self.captions) - 1
            which = [
                empty if d else int(self.caption_N[r]) for r, d in zip(rows, dropped, strict=True)
            ]
            found = [self._text(i) for i in which]
            return {
                name: torch.from_numpy(np.stack([row[name] for row in found])) for name in found[0]
            }
        said = []
        for place, (row, drop) in enumerate(zip(rows, dropped, strict=True)):
            source = self.index.sources[self.index.source_N[row]]
            caption = self.index.text("caption", row)
            drawn = source.captions.draw(caption, caption_rng(seeds(place)))
            said.append("" if drop else drawn)
        return self.diffusion.tokenize(said)

    def _text(self, caption: int) -> dict[str, NDArray[Any]]:
        shards = self._open("text")
        try:
            return shards.row(self._places["text"][caption])
        except Damaged as damaged:
            shards.discard(damaged.shard)
        with locked(self.folder):
            self._build_texts()
        print(f"a file of the cache in {self.folder} was damaged, and is made anew")
        return shards.row(self._places["text"][caption])

    def dropout(self, indices_B: Tensor, rate: float) -> Tensor:
        """The share of captions to drop, for each entry: its source's own, else `rate`."""
        rows = self.samples.rows_E[indices_B.tolist()]
        own = [self.index.sources[s].captions.dropout for s in self.index.source_N[rows]]
        return torch.tensor([rate if one is None else one for one in own])


def _name(size: Sequence[int]) -> str:
    """The folder of images of a size."""
    return f"latents/{size[0]}x{size[1]}"


def _joined(gathered: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([rows[name] for rows in gathered]) for name in gathered[0]}


def _pairs(first: NDArray[Any], second: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.stack([first, second], 1).astype(np.int64))
