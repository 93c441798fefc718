"""All runs of a study in this process, one after another.

    data -> train -> generate -> evaluate        for each run, in runs/NAME-HASH
    analyse -> report                            for the study, in runs/STUDY

A stage that is done is skipped, so running a study again goes on where it stopped, and a study
that shares a run with another finds it done.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from lyco_lab.analyse import analyse
from lyco_lab.analyse.gamma_pair import Verdict
from lyco_lab.config import Run, Study
from lyco_lab.data.stage import prepare
from lyco_lab.evaluate.stage import evaluate
from lyco_lab.generate import generate
from lyco_lab.record import STAGES, Record
from lyco_lab.report import page
from lyco_lab.train import train

Stage = Callable[[Run, Record], None]
BY_NAME: dict[str, Stage] = dict(zip(STAGES, (prepare, train, generate, evaluate), strict=True))


@dataclass(frozen=True)
class Outcome:
    """What a finished study has to show."""

    results: pd.DataFrame
    verdicts: list[Verdict]
    report: Path


@dataclass
class Clock:
    """How long each kind of stage takes, and so how long the rest will."""

    spent_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def left_s(self, waiting: list[str]) -> float | None:
        """For these stages; None while one of them has never been timed."""
        if any(not self.spent_s[stage] for stage in waiting):
            return None
        return sum(sum(self.spent_s[s]) / len(self.spent_s[s]) for s in waiting)


def run_study(
    study: Study,
    root: Path,
    announce: Callable[[str], None] = print,
) -> Outcome:
    """Whatever of the study is not done yet, below `root`; says each stage through `announce`."""
    records = {run.name: Record.open(root, run) for run in study.runs}
    work = [
        (run, stage) for run in study.runs for stage in STAGES if not records[run.name].done(stage)
    ]
    total = len(study.runs) * len(STAGES)
    if len(work) < total:
        announce(f"{total - len(work)} of {total} stages are done already")
    clock = Clock()
    for number, (run, stage) in enumerate(work):
        left_s = clock.left_s([stage for _, stage in work[number:]])
        left = "" if left_s is None else f", about {minutes(left_s)} left"
        announce(f"[{number + 1}/{len(work)}] {run.name}: {stage}{left}")
        began_s = time.monotonic()
        BY_NAME[stage](run, records[run.name])
        clock.spent_s[stage].append(time.monotonic() - began_s)
    announce("comparing")
    return conclude(study, root)


def conclude(study: Study, root: Path) -> Outcome:
    """The tables and the page of a study whose runs are done."""
    results, verdicts = analyse(study, root)
    return Outcome(results, verdicts, page.write(study, root, results, verdicts))


def minutes(seconds: float) -> str:
    """75 -> '1:15'."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
