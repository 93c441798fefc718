"""Image grids: what each model makes of the same prompts with the same seeds.

A column is a prompt with its seed, a row a model, so looking down a column shows what the adapter
changed and nothing else. Training images come first, as what was to be learnt.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lyco_lab.errors import UserError

COLUMNS = {"train": 1, "trigger": 2, "alter": 4, "style": 2}  # how many prompts of each type
FILLER = "alter"  # shown more often where another type is missing
SAME = ["concept", "kind", "index", "prompt", "seed"]  # what a column of pictures has in common
LARGEST = 256  # pixels; larger images are shown reduced, as the page carries all of them


@dataclass(frozen=True)
class Column:
    kind: str
    prompt: str
    seed: int
    index: int
    concept: str = ""


@dataclass(frozen=True)
class Cell:
    uri: str  # "": the image is gone, or not what it was
    alt: str


@dataclass(frozen=True)
class GridRow:
    label: str
    role: str  # real, base or run
    series: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    concept: str
    category: str
    columns: tuple[Column, ...]
    rows: tuple[GridRow, ...]

    @property
    def kinds(self) -> list[tuple[str, int]]:
        """(prompt type, number of neighbouring columns), for the head that spans them."""
        names = [column.kind for column in self.columns]
        return [(kind, names.count(kind)) for kind in dict.fromkeys(names)]


def choose_columns(tables: Sequence[pd.DataFrame]) -> tuple[Column, ...]:
    """A few prompts of each type that all models were given, different ones as far as there are.

    Of several concepts, different ones too.
    """
    images = tables[0]
    for other in tables[1:]:
        images = images.merge(other[SAME], on=SAME)
    columns = []
    kinds = list(dict.fromkeys(images["kind"]))
    spare = sum(count for kind, count in COLUMNS.items() if kind not in kinds)
    for kind in kinds:
        rows = images[images["kind"] == kind]
        first = rows.drop_duplicates("prompt")
        first = first.iloc[np.argsort(first.groupby("concept").cumcount(), kind="stable")]
        wanted = COLUMNS[kind] + spare * (kind == FILLER)
        chosen = pd.concat([first, rows.drop(first.index)]).head(wanted).sort_index()
        columns += [
            Column(kind, row["prompt"], int(row["seed"]), int(row["index"]), row["concept"])
            for row in chosen.to_dict("records")
        ]
    return tuple(columns)


def model_row(
    label: str,
    role: str,
    series: int,
    images: pd.DataFrame,
    columns: Sequence[Column],
    find: Callable[[str], Path],
) -> GridRow:
    """One model's images of the columns' prompts; `find` gives a file, or a `UserError`."""
    files = images.set_index(["concept", "kind", "index"])["file"]
    cells = [
        cell(find, files[c.concept, c.kind, c.index], f"{label}: {c.prompt} (seed {c.seed})")
        for c in columns
    ]
    return GridRow(label, role, series, tuple(cells))


def cell(find: Callable[[str], Path], name: str, alt: str) -> Cell:
    try:
        return Cell(data_uri(find(name)), alt)
    except UserError:
        return Cell("", f"{alt}: the image is gone, or has changed since it was scored")


def real_row(files: Sequence[Path], captions: Sequence[str], count: int) -> GridRow:
    """Training images, spread evenly over the folder."""
    step = max(1, len(files) // max(1, count))
    chosen = list(range(0, len(files), step))[:count]
    cells = [Cell(data_uri(files[i]), f"training image: {captions[i]}") for i in chosen]
    cells += [Cell("", "the training image is gone")] * (0 if files else count)
    return GridRow("training images", "real", 0, tuple(cells))


def data_uri(file: Path) -> str:
    """The image itself as a URI; small files byte for byte, so that what is seen was scored."""
    with Image.open(file) as image:
        if file.suffix.lower() == ".png" and max(image.size) <= LARGEST:
            return _uri("image/png", file.read_bytes())
        reduced = image.convert("RGB")
    reduced.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    reduced.save(buffer, format="WEBP", quality=88)
    return _uri("image/webp", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
