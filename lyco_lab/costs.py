"""What a study will cost: steps, images and disk by arithmetic, hours where somebody measured them.

A study's folder may hold costs.csv, with figures that are stated and not computed:

    run       name of a variant: of all runs called so, or so and a hyphen and more
    hours     of training of one such run
    steps     that it took in them
    memory_gb the largest of the device's memory that it took
    source    who says so, and on what

Disk counts numbers in float32: an adapter one for each trained parameter, a checkpoint that one
and the optimizer's two moments. Two are kept of a run that trains, and the last when it is done.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lyco_lab.config import Study
from lyco_lab.dry_run import Plan
from lyco_lab.errors import UserError

TABLE = "costs.csv"
COLUMNS = ("run", "hours", "steps", "memory_gb", "source")
FLOAT, MOMENTS = 4, 2
GIB = 2**30


@dataclass(frozen=True)
class Stated:
    """Of one run."""

    hours: float
    steps: float
    memory_gb: float
    source: str


def stated(folder: Path) -> dict[str, Stated]:
    """The table of a study's folder by variant; {} where there is none."""
    path = folder / TABLE
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path} has columns {rows.fieldnames}, needs {', '.join(COLUMNS)}")
        try:
            return {
                row["run"]: Stated(
                    hours=float(row["hours"]),
                    steps=float(row["steps"]),
                    memory_gb=float(row["memory_gb"]),
                    source=row["source"],
                )
                for row in rows
            }
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {rows.line_num}: {error}") from error


def variant(name: str, known: Sequence[str]) -> str | None:
    """The longest of `known` that a run's name begins with, as a word."""
    fitting = [one for one in known if name == one or name.startswith(f"{one}-")]
    return max(fitting, key=len, default=None)


def estimates(study: Study, plans: Sequence[Plan], begin: Mapping[str, int]) -> list[str]:
    """For people: of the runs that are to be trained. `begin`: by name, the steps another did."""
    own = {plan.run.name: plan.run.train.steps - begin.get(plan.run.name, 0) for plan in plans}
    steps = sum(own.values())
    samples = sum(own[plan.run.name] * plan.run.train.samples_per_step for plan in plans)
    said = [f"training: {steps:,} steps, {samples:,} samples seen"]
    said.append(_generating(plans))
    factors = [plan.params * FLOAT for plan in plans]
    states = [(1 + MOMENTS) * size for size in factors]
    kept = sum(states) + max(states)
    said.append(
        f"disk: {sum(factors) / GIB:.1f} GiB of adapters, {kept / GIB:.1f} GiB of "
        f"checkpoints, of a run that is done {max(states) / GIB:.1f} at most; and the images"
    )
    table = stated(study.folder)
    if not table:
        return said
    found = [(plan, variant(plan.run.name, list(table))) for plan in plans]
    rows = [(table[name], own[plan.run.name]) for plan, name in found if name is not None]
    without = len(plans) - len(rows)
    if rows:
        sources = "; ".join(dict.fromkeys(row.source for row, _ in rows))
        hours = sum(row.hours / row.steps * steps for row, steps in rows)
        said.append(
            f"hours: {hours:,.0f} of training for {len(rows)} runs, with "
            f"up to {max(row.memory_gb for row, _ in rows):g} GB of memory, as stated ({sources})"
            + (f"; nothing is stated for the other {without}" if without else "")
        )
    return said


def _generating(plans: Sequence[Plan]) -> str:
    """How many images are drawn: concepts x types x images, less styles' prompts of type style."""
    asked: dict[str, int] = {}
    for plan in plans:
        how = plan.run.generate
        concepts = f"{plan.concepts} concept{'s' * (plan.concepts != 1)}"
        each = f"{len(how.types)} type{'s' * (len(how.types) != 1)} x {how.images_per_type}"
        if plan.images:
            rest = plan.concepts * len(how.types) * how.images_per_type - plan.drawn
            less = f" - {rest:,} (a style is not drawn in styles)" * bool(rest)
            text = f"{concepts} x {each}{less} = {plan.drawn:,}"
        else:
            text = f"? concepts x {each}"
        asked[text] = asked.get(text, 0) + 1
    runs = "; ".join(f"{text}, {n} run{'s' * (n != 1)}" for text, n in asked.items())
    total = sum(plan.drawn for plan in plans)
    whole = f"{total:,} images" if all(plan.images for plan in plans) else "images"
    return f"generating: {whole}, and those of the base model ({runs})"
