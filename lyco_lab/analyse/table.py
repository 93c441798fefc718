"""A study's results as one table: a row per run, and per concept the rows to read them against.

    run, concept, category, adapter    what it is; the adapter "base" is the model before training,
                                       "real" the training images looked at as if generated
    COLUMN, COLUMN_se                  a metric on the prompt type it is quoted on, and the standard
                                       error of its mean over prompts (empty where there is none)
    trainable_params, train_seconds    what it cost

Metrics say themselves in which columns they are quoted; FIRST only fixes the order of the usual
ones. Real images have no prompt types, so their one value stands in every column of a metric.
"""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from lyco_lab.config import Run, Study
from lyco_lab.data.stage import dataset
from lyco_lab.errors import UserError
from lyco_lab.evaluate import METRICS
from lyco_lab.evaluate.base import Metric
from lyco_lab.evaluate.stage import REAL, STAGE
from lyco_lab.record import Record, atomic

BASE = "base"
RESULTS = "results.csv"
FIRST = (
    "image_similarity_train",
    "image_similarity_alter",
    "text_similarity_alter",
    "vendi_trigger",
    "style_loss",
    "concept_accuracy_trigger",
    "attribute_accuracy_alter",
)
COSTS = ("trainable_params", "train_seconds")


def quoted() -> dict[str, tuple[Metric, str]]:
    """Column -> (metric, prompt type), in the table's order."""
    found = {column: (m, kind) for m in METRICS.values() for column, kind in m.columns.items()}
    order = [column for column in FIRST if column in found]
    return {column: found[column] for column in [*order, *(c for c in found if c not in FIRST)]}


def table(study: Study, root: Path) -> pd.DataFrame:
    """The table of a study whose runs are evaluated in `root`, also written to `results.csv`."""
    rows = list(_rows(study, root))
    frame = pd.DataFrame(rows)
    buffer = io.StringIO()
    frame.to_csv(buffer, index=False, lineterminator="\n")
    with atomic(study_folder(study, root) / RESULTS) as temporary:
        temporary.write_text(buffer.getvalue())
    return frame


def study_folder(study: Study, root: Path) -> Path:
    """Where a study's own files lie, beside the folders of its runs."""
    return root / study.name


def record_of(run: Run, root: Path) -> Record:
    """The folder of a run that has been through its stages."""
    record = Record(root / run.folder_name)
    if not record.done(STAGE):
        raise UserError(f"run {run.name!r} is not evaluated in {root}: run the study first")
    return record


def _rows(study: Study, root: Path) -> Iterator[dict[str, Any]]:
    """Concept by concept: the base model, its runs, then the real images."""
    concepts: dict[Path, list[tuple[Run, Record]]] = {}
    for run in study.runs:
        record = record_of(run, root)
        references = root / BASE / str(record.facts(STAGE)["references"])
        concepts.setdefault(references, []).append((run, record))
    for path, members in concepts.items():
        run, record = members[0]
        about = {"concept": concept_name(run), "category": dataset(run, record).category}
        references = json.loads(path.read_text())
        yield {"run": BASE, **about, "adapter": BASE, **_scores(references[BASE])}
        for run, record in members:
            kinds = json.loads((record.path / STAGE / "metrics.json").read_text())
            facts = record.facts("train")
            yield {
                "run": run.name,
                **about,
                "adapter": run.adapter["kind"],
                **_scores(kinds),
                **{cost: facts[cost] for cost in COSTS},
            }
        real = {kind: references[REAL][REAL] for _, kind in quoted().values()}
        yield {"run": REAL, **about, "adapter": REAL, **_scores(real)}


def concept_name(run: Run) -> str:
    return run.data.concept or Path(str(run.data.folder)).name


def _scores(kinds: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """The quoted columns; NaN where a metric does not apply."""
    row: dict[str, float] = {}
    for column, (metric, kind) in quoted().items():
        score = kinds.get(kind, {}).get(metric.name, {})
        for name, key in ((column, "mean"), (f"{column}_se", "standard_error")):
            value = score.get(key)
            row[name] = math.nan if value is None else float(value)
    return row
