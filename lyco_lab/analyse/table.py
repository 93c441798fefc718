"""A study's results as one table: a row per run, and per concept the rows to read them against.

    run, concept, category, adapter    what it is; the adapter "base" is the model before training,
                                       "real" the training images looked at as if generated
    COLUMN, COLUMN_se                  a metric on the prompt type it is quoted on, and the standard
                                       error of its mean over prompts (empty where there is none)
    trainable_params, train_seconds    what it cost

Where a folder holds several concepts a row is the mean over them, and COLUMN_se is over their
classes (lyco_lab/evaluate/stage.py); `concepts.csv` has the same columns for each concept, with its
class and category, and errors over prompts.

Metrics say themselves in which columns they are quoted; FIRST only fixes the order of the usual
ones. Real images have no prompt types, so their one value stands in every column of a metric.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lyco_lab.config import Run, Study
from lyco_lab.errors import UserError
from lyco_lab.evaluate import METRICS
from lyco_lab.evaluate.base import Metric
from lyco_lab.evaluate.stage import CONCEPTS, METRICS_FILE, REAL, STAGE
from lyco_lab.files import atomic, cell
from lyco_lab.integrity import BASE
from lyco_lab.readers import read_json, read_parquet
from lyco_lab.record import Record

RESULTS = "results.csv"
BY_CONCEPT = "concepts.csv"
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
    """The table of a study whose runs are evaluated in `root`.

    Also written to `results.csv`; and, of data that hold several concepts, `concepts.csv`.
    """
    models = list(_models(study, root))
    frame = pd.DataFrame([model.row() for model in models])
    _write(frame, study_folder(study, root) / RESULTS)
    if rows := [row for model in models for row in model.concept_rows()]:
        _write(pd.DataFrame(rows), study_folder(study, root) / BY_CONCEPT)
    return frame


def _write(frame: pd.DataFrame, path: Path) -> None:
    buffer = io.StringIO()
    frame.map(cell).to_csv(buffer, index=False, lineterminator="\n")
    with atomic(path) as temporary:
        temporary.write_text(buffer.getvalue())


def study_folder(study: Study, root: Path) -> Path:
    """Where a study's own files lie, beside the folders of its runs."""
    return root / study.name


def record_of(run: Run, root: Path) -> Record:
    """The folder of a run that has been through its stages."""
    record = Record(root / run.folder_name)
    if not record.mark_file(STAGE).is_file():
        raise UserError(f"run {run.name!r} is not evaluated in {root}: run the study first")
    record.mark(STAGE)  # an error that names the file if it is damaged
    return record


def scores_of(record: Record) -> dict[str, Any]:
    """What a run's evaluation found, as metrics.json has it."""
    return read_json(record.output(STAGE, f"{STAGE}/{METRICS_FILE}"))


def image_scores(record: Record) -> pd.DataFrame:
    """A row for each image of a run that is evaluated."""
    columns = ("file", "kind", "index", "prompt", "seed", "concept")
    return read_parquet(record.output(STAGE, f"{STAGE}/images.parquet"), columns)


def over(record: Record) -> str:
    """Of how many concepts a run's scores are means, and over what their errors are; "" of one."""
    scores = scores_of(record)
    if (concepts := scores.pop(CONCEPTS, None)) is None:
        return ""
    units = {(score["unit"], score["n"]) for kind in scores.values() for score in kind.values()}
    unit, n = max(units, key=lambda unit: unit[1])
    many = "classes" if unit == "class" else "concepts"
    return f"means over {len(concepts)} concepts; ± over {n} {many}"


@dataclass(frozen=True)
class _Model:
    """A run, or one of the two that it is read against."""

    name: str
    about: dict[str, str]  # the images that it is about
    adapter: str
    scores: dict[str, Any]  # as metrics.json has them
    concepts: dict[str, dict[str, str]]  # by name: their class and category
    costs: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        about = {"run": self.name, **self.about, "adapter": self.adapter}
        return {**about, **_scores(self.scores), **self.costs}

    def concept_rows(self) -> Iterator[dict[str, Any]]:
        for name, kinds in self.scores.get(CONCEPTS, {}).items():
            concept = self.concepts[name]
            yield {
                "run": self.name,
                "data": self.about["concept"],
                "concept": name,
                "class": concept["class"],
                "category": concept["category"],
                "adapter": self.adapter,
                **_scores(kinds),
            }


def _models(study: Study, root: Path) -> Iterator[_Model]:
    """Data by data: the base model, its runs, then the real images."""
    by_data: dict[Path, list[tuple[Run, Record]]] = {}
    for run in study.runs:
        record = record_of(run, root)
        file = root / BASE / str(record.facts(STAGE)["references"])
        by_data.setdefault(file, []).append((run, record))
    for path, members in by_data.items():
        run, record = members[0]
        facts = record.facts(STAGE)
        about = {"concept": run.data.title, "category": facts["category"]}
        concepts = {concept["name"]: concept for concept in facts["concepts"]}
        references = read_json(Record(path.parent).output(path.stem, path.name))
        yield _Model(BASE, about, BASE, references[BASE], concepts)
        for run, record in members:
            scores = scores_of(record)
            facts = record.facts("train")
            costs = {cost: facts[cost] for cost in COSTS}
            yield _Model(run.name, about, run.adapter["kind"], scores, concepts, costs)
        yield _Model(REAL, about, REAL, _of_any_prompt(references[REAL]), concepts)


def _of_any_prompt(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores of real images, which no prompt made, in the place of every type's."""
    found = {kind: scores[REAL] for _, kind in quoted().values()}
    for name, kinds in scores.get(CONCEPTS, {}).items():
        found.setdefault(CONCEPTS, {})[name] = _of_any_prompt(kinds)
    return found


def _scores(kinds: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """The quoted columns; NaN where a metric does not apply."""
    row: dict[str, float] = {}
    for column, (metric, kind) in quoted().items():
        score = kinds.get(kind, {}).get(metric.name, {})
        for name, key in ((column, "mean"), (f"{column}_se", "standard_error")):
            value = score.get(key)
            row[name] = math.nan if value is None else float(value)
    return row
