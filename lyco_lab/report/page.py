"""The page of a study: question, findings, table, images, charts, and how it was made.

One HTML file that holds everything it shows: images as data URIs, charts as inline SVG, styles in
the page, no script, no request to anywhere (its own Content-Security-Policy forbids them).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from lyco_lab.analyse.gamma_pair import Verdict, read_losses
from lyco_lab.analyse.table import image_scores, over, quoted, record_of, study_folder
from lyco_lab.config import Run, Study
from lyco_lab.data.stage import dataset
from lyco_lab.errors import UserError
from lyco_lab.evaluate.stage import FOREIGN, foreign
from lyco_lab.evaluate.stage import STAGE as EVALUATED
from lyco_lab.files import atomic
from lyco_lab.fold import DATA, TRAIN, whose
from lyco_lab.generate import STAGE as GENERATED
from lyco_lab.integrity import BASE, METRICS
from lyco_lab.record import Record, identity
from lyco_lab.report import figures, grids
from lyco_lab.report.findings import caveat, findings
from lyco_lab.report.table import NAMES, form_of, table_rows
from lyco_lab.states import Missing

REPORT = "report.html"
X, Y = "text_similarity_alter", "image_similarity_alter"
X_TITLE, Y_TITLE = "text similarity → obeys", "image similarity → resembles"
SHOWN_STEPS = 3  # of a gamma pair's losses, at either end


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup


@dataclass(frozen=True)
class GammaSection:
    verdict: Verdict
    colours: tuple[int, int]
    differences: tuple[tuple[str, str, str], ...]
    chart: Markup
    steps: tuple[tuple[int, str, str], ...]  # a few, as hexadecimal floats


def write(
    study: Study,
    root: Path,
    results: pd.DataFrame,
    verdicts: Sequence[Verdict],
    missing: Sequence[Missing] = (),
    unjudged: Sequence[str] = (),
) -> Path:
    """Write `root/STUDY/report.html` from the study's table and the folders of its runs.

    `missing`: runs without results, of which the page says why. `unjudged`: sentences about pairs
    that cannot be compared. At least one run has to be done.
    """
    numbers = series(study)  # colours do not change when a run is added
    absent, asked = {each.name for each in missing}, len(study.runs)
    study = replace(study, runs=tuple(run for run in study.runs if run.name not in absent))
    by_name = {run.name: short_name(run) for run in study.runs}
    results = results.assign(label=[NAMES.get(n, by_name.get(n, n)) for n in results["run"]])
    forms = {column: form_of(results[column]) for column in quoted()}
    means = {name: over(record_of(m[0], root)) for name, m in by_concept(study).items()}
    html = _template().render(
        study=study,
        asked=asked,
        missing=missing,
        unjudged=unjudged,
        legend=[(label, numbers[label]) for label in series(study)],
        findings=findings(results, list(verdicts)),
        caveat=caveat(len({run.seed for run in study.runs}), several=any(means.values())),
        foreign=FOREIGN if any(map(foreign, study.runs)) else "",
        gone=gone(study, root),
        shared=list(filter(None, (whose(run, root) for run in study.runs))),
        heads=[(m, kind, forms[column].unit) for column, (m, kind) in quoted().items()],
        tables=[
            (concept, about(rows, means[concept]), table_rows(rows, numbers, forms))
            for concept, rows in results.groupby("concept", sort=False)
        ],
        grids=[grid(members, root, numbers) for members in by_concept(study).values()],
        scatters=scatters(results, numbers),
        losses=losses(study, root, numbers),
        gammas=[gamma_section(study, verdict, numbers) for verdict in verdicts],
        settings=study.runs[0],
        swatch=lambda number, role="run": Markup(_swatch(number, role)),
    )
    path = study_folder(study, root) / REPORT
    with atomic(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def about(rows: pd.DataFrame, means: str) -> str:
    """What stands beside the name of some rows: the category, and what they are means of."""
    return ", ".join(filter(None, (str(rows["category"].iloc[0]), means)))


def short_name(run: Run) -> str:
    """The run's name without its concept, which every place on the page shows anyway."""
    parts = [part for part in run.name.split("-") if part != run.data.title]
    return "-".join(parts) or run.name


def series(study: Study) -> dict[str, int]:
    """Label -> its colour and shape, the same wherever the page shows it."""
    return {label: i for i, label in enumerate(dict.fromkeys(map(short_name, study.runs)))}


def by_concept(study: Study) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in study.runs:
        found.setdefault(run.data.title, []).append(run)
    return found


def grid(members: list[Run], root: Path, numbers: dict[str, int]) -> grids.Grid:
    """The images of all runs of one concept, by the tables of their scores."""
    records = [record_of(run, root) for run in members]
    tables = [image_scores(record) for record in records]
    columns = grids.choose_columns(tables)
    facts, base = records[0].facts(EVALUATED), base_of(records[0])

    def before(name: str) -> Path:
        return base.output(GENERATED, str(PurePosixPath(name).relative_to(GENERATED)))

    rows = [
        grids.real_row(*training_images(members[0], records[0]), len(columns)),
        grids.model_row(NAMES[BASE], BASE, 0, tables[0], columns, before),
    ]
    for run, record, made in zip(members, records, tables, strict=True):
        label, drawn = short_name(run), partial(record.output, GENERATED)
        rows.append(grids.model_row(label, "run", numbers[label], made, columns, drawn))
    return grids.Grid(members[0].data.title, facts["category"], columns, tuple(rows))


def training_images(run: Run, record: Record) -> tuple[list[Path], list[str]]:
    """Files and captions; none where the images are gone, as the page does without them."""
    try:
        images = dataset(run, record)
    except UserError:
        return [], []
    return [item.file for item in images.items], list(images.captions)


def base_of(record: Record) -> Record:
    """The folder with the base model's images of a run's prompts."""
    return Record(record.path.parent / BASE / str(record.facts(GENERATED)["base"]))


def gone(study: Study, root: Path) -> list[str]:
    """Files of the study's runs that the page would show and cannot."""
    records = [record_of(run, root) for run in study.runs]
    shown = [(record, stage) for record in records for stage in (DATA, TRAIN, GENERATED)]
    shown += [(base_of(record), GENERATED) for record in records if record.done(GENERATED)]
    found = []
    for record, stage in dict.fromkeys(shown):
        if not record.done(stage):
            found.append(f"{record.mark_file(stage).relative_to(root)} is missing or damaged")
        for fault in record.faults(stage):
            if not fault.spare:
                found.append(f"{fault.path.relative_to(root)} {fault.reason}")
    return found


def scatters(results: pd.DataFrame, numbers: dict[str, int]) -> list[Chart]:
    """Fidelity over controllability, a panel per concept; concepts differ too much for one."""
    panels = {
        str(concept): [
            figures.Point(
                row["label"],
                numbers.get(row["label"], 0),
                row[X],
                row[Y],
                row[f"{X}_se"],
                row[f"{Y}_se"],
                row["adapter"] if row["adapter"] in NAMES else "run",
            )
            for row in rows.to_dict("records")
        ]
        for concept, rows in results.groupby("concept", sort=False)
    }
    said = "image similarity over text similarity on alter prompts, one mark per model"
    charts = []
    for concept, points in panels.items():
        axes = figures.scatter_axes(points, X_TITLE, Y_TITLE)
        charts.append(Chart(concept, Markup(figures.scatter(points, axes, f"{concept}: {said}"))))
    return charts


def losses(study: Study, root: Path, numbers: dict[str, int]) -> list[Chart]:
    """Training losses, a panel per concept, all on the same axes."""
    panels = {}
    for concept, members in by_concept(study).items():
        lines = []
        for run in members:
            try:
                found = read_losses(record_of(run, root).output(TRAIN, METRICS))
            except UserError:
                continue  # said above the findings
            steps, values = list(found), list(found.values())
            label = short_name(run)
            lines.append(figures.smoothed(steps, values, label, numbers[label]))
        panels[concept] = lines
    axes = figures.curve_axes([line for ls in panels.values() for line in ls], "step", "loss")
    said = "running mean of the training loss over steps, one line per run"
    return [
        Chart(concept, Markup(figures.curves(lines, axes, f"{concept}: {said}")))
        for concept, lines in panels.items()
    ]


def gamma_section(study: Study, verdict: Verdict, numbers: dict[str, int]) -> GammaSection:
    """What differs between the two runs, their curves on top of each other, some losses in full."""
    runs = [study.run(verdict.gamma_run), study.run(verdict.rewritten_run)]
    colours = [numbers[short_name(run)] for run in runs]
    steps = [step for step, _, _ in verdict.losses]
    lines = [
        figures.smoothed(steps, [row[1] for row in verdict.losses], verdict.gamma_run, colours[0]),
        figures.smoothed(
            steps, [row[2] for row in verdict.losses], verdict.rewritten_run, colours[1]
        ),
    ]
    axes = figures.curve_axes(lines, "step", "loss")
    said = f"training losses of {verdict.gamma_run} and {verdict.rewritten_run}, one over the other"
    shown = list(verdict.losses)
    if len(shown) > 2 * SHOWN_STEPS:
        shown = shown[:SHOWN_STEPS] + shown[-SHOWN_STEPS:]
    return GammaSection(
        verdict,
        (colours[0], colours[1]),
        tuple(differences(*runs)),
        Markup(figures.curves(lines, axes, said, css="twin")),
        tuple((step, a.hex(), b.hex()) for step, a, b in shown),
    )


def differences(one: Run, other: Run) -> list[tuple[str, str, str]]:
    """(setting, its value in one run, in the other) wherever two runs differ."""
    here, there = flat(identity(one.to_dict())), flat(identity(other.to_dict()))
    keys = [key for key in here | there if here.get(key) != there.get(key)]
    return [(key, str(here.get(key, "–")), str(there.get(key, "–"))) for key in keys]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inside = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return found


def _swatch(number: int, role: str) -> str:
    mark = figures.marker(number, role, 8, 8)
    return f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true">{mark}</svg>'


def _template() -> jinja2.Template:
    environment: Any = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template: jinja2.Template = environment.get_template("page.html.j2")
    return template
