"""The stage: images -> one row per image, and the aggregates that tables quote.

    NAME-HASH/evaluate/images.parquet    every image with its prompt, seed and scores
    NAME-HASH/evaluate/metrics.json      {prompt type: {score: {mean, standard_error, n, unit}}}
    base/NAME-HASH/references.json       the same for the base model's images, and as "real" for
                                         the training images looked at as if a model had made them

Every score can so be read between its references: what the model did before training, and what
real images reach.

Of a folder that holds several concepts, each is compared with its own training images; metrics.json
has their scores under "concepts", and above them

    S = mean over classes of the mean over a class's sub-classes

with a standard error over classes, the standard deviation of their means / sqrt(their number): not
over prompts. `n` and `unit` say so. Where there is one class, its sub-classes take that place.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from lyco_lab import tracking
from lyco_lab.config import Run
from lyco_lab.data.concepts import Concept
from lyco_lab.data.folder import Dataset
from lyco_lab.data.stage import dataset
from lyco_lab.devices import device
from lyco_lab.diffusion.model import quiet
from lyco_lab.errors import UserError
from lyco_lab.evaluate import METRICS
from lyco_lab.evaluate.attributes import CONCEPT_FAMILY
from lyco_lab.evaluate.base import Encoded, Images, Judges, Score, View
from lyco_lab.files import atomic
from lyco_lab.generate import STAGE as GENERATED
from lyco_lab.generate import base_folder, drawn, read_table, scored, stage_of
from lyco_lab.integrity import BASE
from lyco_lab.miniature import judges as miniature_judges
from lyco_lab.progress import track
from lyco_lab.readers import read_png
from lyco_lab.record import Record

STAGE = "evaluate"
REAL = "real"
METRICS_FILE = "metrics.json"
CONCEPTS = "concepts"  # in it, above their names
FOREIGN = (
    "the encoders that score images were trained on pictures of the embedded world alone: of other "
    "pictures their scores say little"
)

Found = dict[str, dict[str, Score]]  # prompt type -> score
Summary = dict[str, dict[str, dict[str, Any]]]  # prompt type -> score -> mean, standard_error, ...


def evaluate(run: Run, record: Record) -> None:
    """The stage: scores of the run's images, and of its references if no run before had them."""
    rule = run.evaluate.trigger_in_text
    base, references = Record(base_folder(run, record)), f"references-{rule}"
    wanted, missing = record.pending(STAGE), not base.fresh(references)
    if not wanted and not missing:
        return
    if foreign(run):
        print(f"{run.name}: {FOREIGN}")
    with quiet():
        judges: Judges = miniature_judges.load(device=device(run))
    record.require(GENERATED)
    base.require(GENERATED)
    made, before = read_table(record.path / GENERATED), read_table(base.path)
    check_pairs(made, before, record.path, base.path)
    images = dataset(run, record)
    side, groups = side_of(made), by_concept(made, images)

    found: list[Found] = [{} for _ in groups]
    found_base: list[Found] = [{} for _ in groups]
    found_real: list[Found] = [{} for _ in groups]
    todo = [(i, kind) for i, (_, rows) in enumerate(groups) for kind in dict.fromkeys(rows["kind"])]
    for i, kind in track(todo, f"{run.name}: evaluate"):
        concept, mine = groups[i]
        if not found[i]:  # the former concept's images are let go
            shown = images.part(concept.rows)
            real = Encoded(shown.images(side), judges)
            if missing:
                found_real[i][REAL] = measure(view_of_dataset(shown, real, rule))
        theirs = before.loc[mine.index]  # line by line the same prompts
        rows, rows_base = mine[mine["kind"] == kind], theirs[theirs["kind"] == kind]
        partner = Encoded(read_images(rows_base["file"].tolist()), judges)
        ours = Encoded(read_images(rows["file"].tolist()), judges)
        found[i][kind] = measure(view_of(rows, ours, real, partner, rule))
        if missing:
            found_base[i][kind] = measure(view_of(rows_base, partner, real, partner, rule))
    several = [concept for concept, _ in groups] if len(images.concepts) > 1 else []
    if missing:
        file = base.path / f"{references}.json"
        write_json(file, {"base": told(found_base, several), REAL: told(found_real, several)})
        base.finish(references, outputs=[file], reads=[GENERATED])
    if not wanted:
        return
    folder = record.path / STAGE
    per_image = table_of(made, [rows for _, rows in groups], found, record.path)
    with atomic(folder / "images.parquet") as temporary:
        per_image.to_parquet(temporary, index=False)
    scores = told(found, several)
    write_json(folder / METRICS_FILE, scores)
    show(run, record, per_image, {kind: scores[kind] for kind in dict.fromkeys(made["kind"])})
    record.finish(
        STAGE,
        reads=[stage_of(base)],
        beside=[f"{BASE}/{base.path.name}/{references}"],
        images=len(made),
        references=f"{base.path.name}/{references}.json",
        category=images.category,
        concepts=[
            {"name": c.name, "class": c.class_name, "category": c.category}
            for c in (drawn(concept, run.generate.concepts) for concept in images.concepts)
            if c is not None
        ],
    )


def foreign(run: Run) -> bool:
    """Whether a run's images may be none that its judges know."""
    return not run.model.embedded or run.data.concept is None


def by_concept(made: pd.DataFrame, images: Dataset) -> list[tuple[Concept, pd.DataFrame]]:
    """Each concept that was drawn, with the rows of its images."""
    if len(images.concepts) == 1:
        return [(images.concepts[0], made)]
    known = {concept.name: concept for concept in images.concepts}
    found = [(name, rows) for name, rows in made.groupby("concept", sort=False)]
    for name, _ in found:
        if name not in known:
            raise UserError(
                f"images were made of {name!r}, which is none of the concepts in {images.folder}: "
                f"they are {', '.join(known)}; delete the run's folder {GENERATED} and run again"
            )
    return [(known[name], rows) for name, rows in found]


def told(found: Sequence[Found], several: Sequence[Concept]) -> dict[str, Any]:
    """Scores as JSON has them; of several concepts their means, and their own below "concepts"."""
    if not several:
        return summary(found[0])
    names = [concept.name for concept in several]
    return {
        **summary(means(found, [concept.class_name for concept in several])),
        CONCEPTS: {name: summary(each) for name, each in zip(names, found, strict=True)},
    }


def means(found: Sequence[Found], classes: Sequence[str]) -> Found:
    """Over the classes, each the mean over its sub-classes; where there is one class, over these.

    A concept to which a score does not apply has no part in its mean.
    """
    unit: Literal["class", "concept"] = "class"
    if len(set(classes)) in (1, len(classes)):
        unit, classes = "concept", [str(i) for i in range(len(classes))]
    over: Found = {}
    for kind in dict.fromkeys(kind for each in found for kind in each):
        by_score: dict[str, dict[str, list[float]]] = {}
        for each, name in zip(found, classes, strict=True):
            for score, value in each.get(kind, {}).items():
                if value.n:
                    by_score.setdefault(score, {}).setdefault(name, []).append(value.mean)
        over[kind] = {
            score: Score(tuple(map(float, map(np.mean, by_class.values()))), tuple(by_class), unit)
            for score, by_class in by_score.items()
        }
    return over


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
        for name in ("images.parquet", METRICS_FILE):
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
        concepts=[named(name, images.judges) for name in rows["concept"]],
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
        concepts=[named(i.concept, real.judges) for i in items],
    )


def known(attributes: Any, judges: Judges) -> dict[str, str]:
    """What the oracle can be asked of a folder's own labels, which may speak another language."""
    words = judges.vocabulary
    return {f: v for f, v in attributes.items() if f in words and v in words[f]}


def named(concept: str, judges: Judges) -> str:
    """What the oracle calls a concept; "" where it has no word for it."""
    return known({CONCEPT_FAMILY: concept}, judges).get(CONCEPT_FAMILY, "")


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


def table_of(
    made: pd.DataFrame, groups: Sequence[pd.DataFrame], found: Sequence[Found], root: Path
) -> pd.DataFrame:
    """One row per image with every score that is about an image."""
    parts = []
    for rows, kinds in zip(groups, found, strict=True):
        for kind, scores in kinds.items():
            part = rows[rows["kind"] == kind].copy()
            for name, score in scores.items():
                if score.unit == "image":
                    part[name] = np.array(score.values)
            parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    table["file"] = [str(Path(file).relative_to(root)) for file in table["file"]]
    return table


def check_pairs(made: pd.DataFrame, before: pd.DataFrame, run: Path, base: Path) -> None:
    """The style loss compares image with image: prompts and seeds must agree line by line."""
    columns = ["concept", "kind", "index", "prompt", "seed"]
    if not made[columns].equals(before[columns]):
        raise UserError(
            f"the images in {run / GENERATED} and in {base} were not made from the same prompts "
            "and seeds: delete both folders and run again"
        )


def read_images(files: Sequence[str]) -> Images:
    return np.stack([read_png(Path(file)) for file in files])


def side_of(made: pd.DataFrame) -> int:
    return read_png(Path(made["file"].iloc[0])).shape[1]


def write_json(path: Path, content: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
