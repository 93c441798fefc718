"""The stage: images -> one row per image, and the aggregates that tables quote.

    NAME-HASH/evaluate/images.parquet    every image with its prompt, seed and scores
    NAME-HASH/evaluate/metrics.json      {prompt type: {score: mean, standard_error, n, unit}}
    base/NAME-HASH/references.json       the same for the base model's images, and as "real" for
                                         the training images looked at as if a model had made them

Every score can so be read between its references: what the model did before training, and what
real images reach.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from lyco_lab import tracking
from lyco_lab.config import Run
from lyco_lab.data.folder import Dataset
from lyco_lab.data.stage import dataset
from lyco_lab.diffusion.model import quiet
from lyco_lab.errors import UserError
from lyco_lab.evaluate import METRICS
from lyco_lab.evaluate.base import Encoded, Images, Judges, Score, View
from lyco_lab.generate import STAGE as GENERATED
from lyco_lab.generate import base_folder, read_table, scored
from lyco_lab.miniature import judges as miniature_judges
from lyco_lab.progress import track
from lyco_lab.record import Record, atomic

STAGE = "evaluate"
REAL = "real"

Found = dict[str, dict[str, Score]]  # prompt type -> score
Summary = dict[str, dict[str, dict[str, Any]]]  # prompt type -> score -> mean, standard_error, ...


def evaluate(run: Run, record: Record) -> None:
    """The stage: scores of the run's images, and of its references if no run before had them."""
    if record.done(STAGE):
        return
    with quiet():
        judges: Judges = miniature_judges.load()
    folder, base = record.path / STAGE, base_folder(run, record)
    made, before = read_table(record.path / GENERATED), read_table(base)
    check_pairs(made, before, record.path, base)
    images = dataset(run, record)
    rule = run.evaluate.trigger_in_text
    real = Encoded(images.images(side_of(made)), judges)
    references = base / f"references-{rule}.json"
    missing = not references.is_file()

    found: Found = {}
    found_base: Found = {}
    for kind in track(list(dict.fromkeys(made["kind"])), f"{run.name}: evaluate"):
        rows, rows_base = made[made["kind"] == kind], before[before["kind"] == kind]
        partner = Encoded(read_images(rows_base["file"].tolist()), judges)
        ours = Encoded(read_images(rows["file"].tolist()), judges)
        found[kind] = measure(view_of(rows, ours, real, partner, rule))
        if missing:
            found_base[kind] = measure(view_of(rows_base, partner, real, partner, rule))
    if missing:
        found_real = {REAL: measure(view_of_dataset(images, real, rule))}
        write_json(references, {"base": summary(found_base), REAL: summary(found_real)})
    per_image = table_of(made, found, record.path)
    with atomic(folder / "images.parquet") as temporary:
        per_image.to_parquet(temporary, index=False)
    write_json(folder / "metrics.json", summary(found))
    show(run, record, per_image, summary(found))
    record.finish(STAGE, images=len(made), references=f"{base.name}/{references.name}")


def show(run: Run, record: Record, per_image: pd.DataFrame, scores: Summary) -> None:
    """The copy that W&B gets: aggregates, the per-image table, and both files."""
    rows = per_image.astype(object).where(per_image.notna(), None)
    with tracking.track(run, record, STAGE) as tracker:
        tracker.summary(
            {
                f"eval/{kind}/{name}": score["mean"]
                for kind, found in scores.items()
                for name, score in found.items()
            }
        )
        tracker.table("eval/images", list(rows.columns), rows.values.tolist())
        for name in ("images.parquet", "metrics.json"):
            tracker.file(record.path / STAGE / name, f"{run.name}-{Path(name).stem}", "metrics")


def measure(view: View) -> dict[str, Score]:
    return {name: score for m in METRICS.values() for name, score in m.measure(view).items()}


def view_of(rows: pd.DataFrame, images: Encoded, real: Encoded, base: Encoded, rule: str) -> View:
    """The images of one prompt type, as the table lists them."""
    return View(
        kind=str(rows["kind"].iloc[0]),
        images=images,
        real=real,
        base=base,
        texts=rows[f"scored_{rule}"].tolist(),
        prompts=rows["prompt"].tolist(),
        attributes=[json.loads(text) for text in rows["attributes"]],
        concepts=rows["concept"].tolist(),
    )


def view_of_dataset(images: Dataset, real: Encoded, rule: str) -> View:
    """The training images as if a model had made them from their own captions."""
    items = images.items
    return View(
        kind=REAL,
        images=real,
        real=real,
        base=None,
        texts=[scored(i.caption, i.trigger, i.class_word)[rule] for i in items],
        prompts=images.captions,
        attributes=[known(i.attributes, real.judges) for i in items],
        concepts=[known({"concept": i.concept}, real.judges).get("concept", "") for i in items],
    )


def known(attributes: Any, judges: Judges) -> dict[str, str]:
    """What the oracle can be asked of a folder's own labels, which may speak another language."""
    words = judges.vocabulary
    return {f: v for f, v in attributes.items() if f in words and v in words[f]}


def summary(found: Found) -> Summary:
    """Aggregates as JSON has them: NaN becomes null."""

    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        kind: {
            name: {
                "mean": plain(score.mean),
                "standard_error": plain(score.standard_error),
                "n": score.n,
                "unit": score.unit,
            }
            for name, score in sorted(scores.items())
        }
        for kind, scores in found.items()
    }


def table_of(made: pd.DataFrame, found: Found, root: Path) -> pd.DataFrame:
    """One row per image with every score that is about an image."""
    parts = []
    for kind, scores in found.items():
        part = made[made["kind"] == kind].copy()
        for name, score in scores.items():
            if score.unit == "image":
                part[name] = np.array(score.values)
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    table["file"] = [str(Path(file).relative_to(root)) for file in table["file"]]
    return table


def check_pairs(made: pd.DataFrame, before: pd.DataFrame, run: Path, base: Path) -> None:
    """The style loss compares image with image: prompts and seeds must agree line by line."""
    columns = ["kind", "index", "prompt", "seed"]
    if not made[columns].equals(before[columns]):
        raise UserError(
            f"the images in {run / GENERATED} and in {base} were not made from the same prompts "
            "and seeds: delete both folders and run again"
        )


def read_images(files: Sequence[str]) -> Images:
    images = []
    for file in files:
        try:
            with Image.open(file) as opened:
                images.append(np.asarray(opened.convert("RGB")))
        except (OSError, SyntaxError) as error:
            raise UserError(
                f"cannot read the image {file}: {error}; delete it and run again"
            ) from error
    return np.stack(images)


def side_of(made: pd.DataFrame) -> int:
    with Image.open(made["file"].iloc[0]) as image:
        return image.width


def write_json(path: Path, content: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
