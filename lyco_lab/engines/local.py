"""All runs of a study on this machine, one after another or a few at a time.

    data -> train -> generate -> evaluate        for each run, in runs/NAME-HASH
    analyse -> report                            for the study, in runs/STUDY

A stage that is done is skipped, so running a study again goes on where it stopped, and a study
that shares a run with another finds it done. Of runs that are equivalent one is carried out, and
the others get each stage's result as soon as it is there (lyco_lab/fold.py); of runs that differ
in their number of steps each goes on from the one before it (lyco_lab/longer.py).

With several workers each run has a process of its own, with its share of the processor's cores.
A run's folder is locked while it is worked on, and workers die with the process that began them:
a second command, or the same one after a kill, never writes beside the first.
"""

import multiprocessing
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lyco_lab import progress
from lyco_lab.analyse import analyse
from lyco_lab.analyse.gamma_pair import Verdict
from lyco_lab.analyse.unfolded import Comparison, compare
from lyco_lab.config import Run, Study
from lyco_lab.data.stage import check_model, prepare
from lyco_lab.errors import Interrupted
from lyco_lab.evaluate.stage import evaluate
from lyco_lab.files import locked
from lyco_lab.fold import TRAIN, Fold, discard, folding, in_pairs, set_aside, share
from lyco_lab.generate import generate
from lyco_lab.integrity import mend, shared_with
from lyco_lab.longer import begin as begin_from_shorter
from lyco_lab.longer import lines
from lyco_lab.record import STAGES, Record
from lyco_lab.report import page
from lyco_lab.train import plugs, train
from lyco_lab.workers import begin, cores

Stage = Callable[[Run, Record], None]
BY_NAME: dict[str, Stage] = dict(zip(STAGES, (prepare, train, generate, evaluate), strict=True))
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a finished study has to show."""

    results: pd.DataFrame
    verdicts: list[Verdict]
    report: Path
    compared: list[Comparison] = field(default_factory=list)  # of equivalent runs, each trained


@dataclass
class Clock:
    """How long each kind of stage takes, and so how long the rest will."""

    spent_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def left_s(self, waiting: list[str], workers: int = 1) -> float | None:
        """For these stages, shared by `workers`; None while one was never timed."""
        if any(not self.spent_s[stage] for stage in waiting):
            return None
        return sum(sum(self.spent_s[s]) / len(self.spent_s[s]) for s in waiting) / workers


def suggested_workers(study: Study) -> int:
    """One process per core for the embedded model.

    A full-size model takes all cores, or the GPU, and most of the memory for itself.
    """
    if not embedded(study) or torch.cuda.is_available():
        return 1
    return max(1, min(cores(), len(study.runs)))


def threads(study: Study, workers: int) -> int:
    """Cores for each run. The embedded model gains nothing from a second one, and with one its
    results do not depend on how many a machine has, since sums are split among threads."""
    return 1 if embedded(study) else max(1, cores() // workers)


def embedded(study: Study) -> bool:
    return all(run.model.embedded for run in study.runs)


def run_study(
    study: Study,
    root: Path,
    announce: Announce = print,
    workers: int = 1,
    *,
    fold: bool = True,
) -> Outcome:
    """Whatever of the study is not done yet, below `root`; says each stage through `announce`.

    Without `fold` every run trains from its first step, also where an equivalent one has the
    result, or a shorter one the beginning.
    """
    records = {run.name: Record.open(root, run) for run in study.runs}
    for line in mended(records.values()):
        announce(line)
    for run in study.runs:
        check_model(run, records[run.name])
        plugs(run)
        if not fold or run.name in in_pairs(study):
            set_aside(records[run.name])
    folds = folding(study, root).folds if fold else {}
    total = len(study.runs) * len(STAGES)
    done = sum(record.settled(stage) for record in records.values() for stage in STAGES)
    if done:
        announce(f"{done} of {total} stages are done already")
    fresh = in_pairs(study) if fold else {run.name for run in study.runs}
    jobs = [job for job in _jobs(study, records, folds, fresh) if job]
    workers = min(workers, max(1, len(jobs)))
    if workers > 1:
        _side_by_side(jobs, root, announce, workers, threads(study, workers))
    else:
        torch.set_num_threads(threads(study, workers))
        _one_by_one(jobs, root, announce)
    for record in records.values():
        discard(record)
    announce("comparing")
    return conclude(study, root, unfolded=not fold)


@dataclass(frozen=True)
class Step:
    """A stage of a run, to be carried out or, with a `fold`, taken from an equivalent run."""

    run: Run
    stage: str
    fold: Fold | None = None
    fresh: bool = False  # whether it trains from its first step in any case

    def take(self, root: Path) -> None:
        record = Record(root / self.run.folder_name)
        if self.fold is not None:
            share(self.fold, root, self.stage)
            return
        with locked(record.path):
            if self.stage == TRAIN and not self.fresh:
                begin_from_shorter(self.run, record)
            BY_NAME[self.stage](self.run, record)


Job = list[Step]  # of a run and those that need its result, one after another


def _jobs(
    study: Study, records: Mapping[str, Record], folds: Mapping[str, Fold], fresh: Collection[str]
) -> Iterator[Job]:
    for line in lines([run for run in study.runs if run.name not in folds], fresh):
        job = []
        for run in line:
            takers = [fold for fold in folds.values() if fold.source is run]
            for stage in STAGES:
                job.append(Step(run, stage, fresh=run.name in fresh))
                # Every run has images of its own, by which it is seen that they are the same.
                own = stage == STAGES[0]
                job += [Step(fold.run, stage, None if own else fold) for fold in takers]
        yield [step for step in job if step.stage in to_do(records[step.run.name])]


def to_do(record: Record) -> Sequence[str]:
    """The stages of a run that are to be carried out: the first that is not settled, and those
    after it, which are passed over where it leaves what they have read."""
    return STAGES[next((i for i, s in enumerate(STAGES) if not record.settled(s)), len(STAGES)) :]


def mended(records: Collection[Record]) -> Iterator[str]:
    """Declare not done what is damaged in runs and in what they share; a line for each fault."""
    folders = [*records, *(shared for record in records for shared in shared_with(record))]
    for folder in {record.path: record for record in folders}.values():
        yield from mend(folder)


def _to_do(jobs: Iterable[Job]) -> list[str]:
    """The stages to be carried out; taking a result takes no time."""
    return [step.stage for job in jobs for step in job if step.fold is None]


def _one_by_one(jobs: Iterable[Job], root: Path, announce: Announce) -> None:
    left, clock = _to_do(jobs), Clock()
    total = len(left)
    for step in (step for job in jobs for step in job):
        if step.fold is not None:
            step.take(root)
            continue
        left_s = clock.left_s(left)
        about = "" if left_s is None else f", about {minutes(left_s)} left"
        announce(f"[{total - len(left) + 1}/{total}] {step.run.name}: {step.stage}{about}")
        began_s = time.monotonic()
        step.take(root)
        clock.spent_s[step.stage].append(time.monotonic() - began_s)
        left.remove(step.stage)


def _side_by_side(
    jobs: list[Job],
    root: Path,
    announce: Announce,
    workers: int,
    threads: int,
) -> None:
    """A process per worker. Here only news is received and shown, in bars that come and go."""
    context = multiprocessing.get_context("spawn")
    news = context.SimpleQueue()
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(workers, context, _begin, (news, threads, os.getpid()))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        screen = stack.enter_context(progress.columns())
        say = screen.console.print if screen.console.is_terminal else announce
        listener = threading.Thread(
            target=_listen, args=(news, screen, say, _to_do(jobs), workers), daemon=True
        )
        listener.start()
        stack.callback(listener.join)
        stack.callback(news.put, None)  # called first: the listener's cue to end
        at_work: list[Future[None]] = [pool.submit(_work, job, root) for job in jobs]
        try:
            for future in as_completed(at_work):
                future.result()
        except BaseException as error:
            for future in at_work:
                future.cancel()
            # Ctrl-C reaches the workers too: they finish their step, save it, and say so.
            if isinstance(error, KeyboardInterrupt):
                saved = "every run that was being worked on has saved its state"
                raise Interrupted(saved) from None
            raise


def _listen(news: Any, screen: Any, say: Announce, left: list[str], workers: int) -> None:
    """Show what workers report until None arrives; `left` are the stages that they will."""
    total = len(left)
    overall = screen.add_task("all runs", total=total, note="")
    bars: dict[str, Any] = {}
    clock = Clock()
    while (item := news.get()) is not None:
        if isinstance(item, progress.News):
            if item.title not in bars:
                bars[item.title] = screen.add_task(item.title, total=item.total, note="")
            screen.update(bars[item.title], completed=item.done, note=item.note)
            if item.done >= item.total:
                screen.remove_task(bars.pop(item.title))
            continue
        name, stage, seconds = item
        clock.spent_s[stage].append(seconds)
        left.remove(stage)
        screen.advance(overall)
        rest = clock.left_s(left, workers)
        about = "" if rest is None else f", about {minutes(rest)} left"
        say(f"[{total - len(left)}/{total}] {name}: {stage} done in {seconds:.0f} s{about}")


_news: Any = None  # a worker's way to the process that shows


def _begin(news: Any, threads: int, parent: int) -> None:
    """Set a worker up: its share of the cores, where its bars go, and whom it dies with."""
    global _news
    _news = news
    begin(threads, parent)
    progress.send_to(news.put)


def _work(job: Job, root: Path) -> None:
    for step in job:
        began_s = time.monotonic()
        step.take(root)
        if step.fold is None:
            _news.put((step.run.name, step.stage, time.monotonic() - began_s))


def conclude(study: Study, root: Path, *, unfolded: bool = False) -> Outcome:
    """The tables and the page of a study whose runs are done.

    With `unfolded` also whether equivalent runs, each trained by itself, came to the same.
    """
    results, verdicts = analyse(study, root)
    compared = compare(study, root) if unfolded else []
    return Outcome(results, verdicts, page.write(study, root, results, verdicts), compared)


def minutes(seconds: float) -> str:
    """75 -> '1:15'."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
