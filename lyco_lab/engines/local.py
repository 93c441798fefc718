"""All runs of a study on this machine, one after another or a few at a time.

    data -> train -> generate -> evaluate        for each run, in runs/NAME-HASH
    analyse -> report                            for the study, in runs/STUDY

A stage that is done is skipped, so running a study again goes on where it stopped, and a study
that shares a run with another finds it done. Of runs that are equivalent one is carried out, and
the others get each stage's result as soon as it is there (lyco_lab/fold.py); of runs that differ
in their number of steps each goes on from the one before it (lyco_lab/longer.py).

A run fails alone. The error is kept in its folder (lyco_lab/states.py), the other runs go on, and
those that were to take its result train themselves. A failed run is tried again only on request.

With several workers each run has a process of its own, with its share of the processor's cores
(lyco_lab/workers.py). A run's folder is locked while it is worked on, and workers die with the
process that began them: a second command, or the same one after a kill, never writes beside the
first.
"""

import contextlib
import fnmatch
import heapq
import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lyco_lab import interrupts, progress
from lyco_lab.analyse import analyse
from lyco_lab.analyse.gamma_pair import Verdict
from lyco_lab.analyse.unfolded import Comparison, compare
from lyco_lab.config import Run, Study
from lyco_lab.data.stage import check_model, prepare
from lyco_lab.diffusion.memory import free
from lyco_lab.errors import Interrupted, UserError, nearest
from lyco_lab.evaluate.stage import evaluate
from lyco_lab.files import locked
from lyco_lab.fold import TRAIN, Fold, discard, folding, in_pairs, set_aside, share
from lyco_lab.generate import generate
from lyco_lab.integrity import mend, shared_with
from lyco_lab.longer import begin as begin_from_shorter
from lyco_lab.longer import lines
from lyco_lab.record import STAGES, Record
from lyco_lab.report import page
from lyco_lab.states import Missing, fail, failure, forgive, missing
from lyco_lab.train import plugs, train
from lyco_lab.train.checkpoint import Checkpoints
from lyco_lab.workers import Done, Failed, Work, cores, supervise

Stage = Callable[[Run, Record], None]
BY_NAME: dict[str, Stage] = dict(zip(STAGES, (prepare, train, generate, evaluate), strict=True))
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a study has to show."""

    results: pd.DataFrame
    verdicts: list[Verdict]
    report: Path | None  # None while no run is done
    compared: list[Comparison] = field(default_factory=list)  # of equivalent runs, each trained
    missing: list[Missing] = field(default_factory=list)  # runs without results
    unjudged: list[str] = field(default_factory=list)  # sentences about pairs of such runs


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


def select(study: Study, only: Sequence[str] = ()) -> list[Run]:
    """The runs whose names match one of the patterns `only` (fnmatch); all without patterns."""
    names = [run.name for run in study.runs]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"--only is {pattern!r}, which matches no run of {study.name!r}: they are called "
                f"{', '.join(names)}{nearest(pattern, names)}"
            )
    return [
        run
        for run in study.runs
        if not only or any(fnmatch.fnmatchcase(run.name, pattern) for pattern in only)
    ]


def run_study(
    study: Study,
    root: Path | str,
    announce: Announce = print,
    workers: int = 1,
    *,
    fold: bool = True,
    only: Sequence[str] = (),
    limit: int | None = None,
    retry_failed: bool = False,
) -> Outcome:
    """Whatever of the study is not done yet, below `root`; says each stage through `announce`.

    Without `fold` every run trains from its first step, also where an equivalent one has the
    result, or a shorter one the beginning. `only` and `limit` leave out runs: those whose names
    match no pattern, and all after the first `limit` that have something left to do. A run that
    failed, now or before, is listed in the outcome, and tried again with `retry_failed`.
    """
    root = Path(root)
    chosen = select(study, only)
    records = {run.name: Record(root / run.folder_name) for run in study.runs}
    records |= {run.name: Record.open(root, run) for run in chosen}
    for line in mended(records[run.name] for run in chosen):
        announce(line)
    for run in chosen:
        check_model(run, records[run.name])
        plugs(run)
        if not fold or run.name in in_pairs(study):
            set_aside(records[run.name])
        if retry_failed:
            forgive(records[run.name])
    done = sum(records[run.name].settled(stage) for run in chosen for stage in STAGES)
    if done:
        announce(f"{done} of {len(chosen) * len(STAGES)} stages are done already")
    for run in chosen:
        if known := failure(records[run.name]):
            announce(
                f"{run.name} failed in {known.stage} before and is not tried again without "
                f"--retry-failed: {known.reason}"
            )
    todo = [run for run in chosen if to_do(records[run.name]) and not failure(records[run.name])]
    queue = Queue(partial(plan, study, root, fold=fold), todo[:limit])
    workers = min(workers, max(1, len(queue.waiting)))
    if queue.waiting:
        act = _one_by_one if workers == 1 else _side_by_side
        act(queue, root, announce, workers, threads(study, workers))
    for run in chosen:
        discard(records[run.name])
    announce("comparing")
    return conclude(study, root, unfolded=not fold)


@dataclass(frozen=True)
class Step:
    """A stage of a run, to be carried out or, with a `fold`, taken from an equivalent run."""

    run: Run
    stage: str
    fold: Fold | None = None
    fresh: bool = False  # whether it trains from its first step in any case
    size: int = 1  # how much there is to do, in units that are alike within a kind of stage

    def take(self, root: Path) -> None:
        record = Record(root / self.run.folder_name)
        if self.fold is not None:
            share(self.fold, root, self.stage)
            if record.settled(self.stage):
                return
        with locked(record.path):
            if self.stage == TRAIN and not self.fresh:
                begin_from_shorter(self.run, record)
            BY_NAME[self.stage](self.run, record)
        forgive(record)


Job = list[Step]  # of a run and those that need its result, one after another


def plan(study: Study, root: Path, runs: Sequence[Run], *, fold: bool = True) -> list[Job]:
    """What is to be done for these runs of a study, by what their folders hold now.

    They may take results of each other and of other runs that are done.
    """
    chosen = {run.name for run in runs}
    records = {run.name: Record(root / run.folder_name) for run in study.runs}
    fresh = in_pairs(study) if fold else {run.name for run in study.runs}
    known = [r for r in study.runs if r.name in chosen or not to_do(records[r.name])]
    folds = folding(replace(study, runs=tuple(known)), root).folds if fold else {}
    folds = {name: each for name, each in folds.items() if name in chosen}
    jobs = []
    others = [[each.run] for each in folds.values() if each.source.name not in chosen]
    for line in lines([run for run in runs if run.name not in folds], fresh) + others:
        job: Job = []
        begun = 0
        for run in line:
            takers = [each for each in folds.values() if each.source is run]
            begun = max(0 if run.name in fresh else begun, _saved(records[run.name]))
            for stage in STAGES:
                size = max(1, run.train.steps - begun) if stage == TRAIN else 1
                mine = folds.get(run.name) if stage != STAGES[0] else None
                job.append(Step(run, stage, mine, run.name in fresh, size))
                # Every run has images of its own, by which it is seen that they are the same.
                own = stage == STAGES[0]
                job += [Step(each.run, stage, None if own else each) for each in takers]
            begun = run.train.steps
        jobs.append([step for step in job if step.stage in to_do(records[step.run.name])])
    return [job for job in jobs if job]


def to_do(record: Record) -> Sequence[str]:
    """The stages of a run that are to be carried out: the first that is not settled, and those
    after it, which are passed over where it leaves what they have read."""
    return STAGES[next((i for i, s in enumerate(STAGES) if not record.settled(s)), len(STAGES)) :]


def mended(records: Iterable[Record]) -> Iterator[str]:
    """Declare not done what is damaged in runs and in what they share; a line for each fault."""
    known = list(records)
    folders = [*known, *(shared for record in known for shared in shared_with(record))]
    for folder in {record.path: record for record in folders}.values():
        yield from mend(folder)


def _saved(record: Record) -> int:
    """The last step whose state is saved."""
    files = Checkpoints.of(record).files()
    number = files[0].stem.removeprefix("step") if files else ""
    return int(number) if number.isdecimal() else 0


class Queue:
    """The steps of a study in their order, and what becomes of them.

    plan(runs): the jobs of some runs. A job is worked on by one slot, a step at a time.
    """

    def __init__(self, plan: Callable[[Sequence[Run]], list[Job]], runs: Sequence[Run]) -> None:
        self.plan = plan
        self.waiting: deque[Job] = deque(plan(runs))
        self.held: dict[int, Job] = {}
        self.at_work: dict[int, tuple[Step, float]] = {}  # and since when
        self.finished = 0
        self.clock = Clock()

    def take(self, slot: int = 0) -> Step | None:
        """The next step for a slot, if there is one that nobody works on."""
        if not self.held.get(slot):
            if not self.waiting:
                return None
            self.held[slot] = self.waiting.popleft()
        step = self.held[slot].pop(0)
        self.at_work[slot] = (step, time.monotonic())
        return step

    def done(self, slot: int, seconds: float) -> None:
        step, _ = self.at_work.pop(slot)
        if step.fold is None:
            self.finished += 1
            self.clock.saw(step, seconds)

    def failed(self, slot: int) -> None:
        """Leave out what needs the step; runs that were to take its result have to train."""
        step, _ = self.at_work.pop(slot)
        if step.fold is None:
            self.finished += 1
        takers = {
            s.run.name: s.run for s in self.held[slot] if s.fold and s.fold.source is step.run
        }
        gone = {step.run.name, *takers}
        self.held[slot] = [s for s in self.held[slot] if s.run.name not in gone]
        self.waiting.extendleft(reversed(self.plan(list(takers.values()))))

    def left(self) -> list[Step]:
        """Steps to be carried out, those at work among them; taking a result takes no time."""
        jobs = [[step for step, _ in self.at_work.values()], *self.held.values(), *self.waiting]
        return [step for job in jobs for step in job if step.fold is None]

    @property
    def total(self) -> int:
        return self.finished + len(self.left())

    def left_s(self, workers: int) -> float | None:
        """Until all is done; None while a kind of stage among the rest was never timed."""
        now = time.monotonic()
        slots = []
        for slot in range(workers):
            ahead = self.clock.needs_s(self.held.get(slot, []))
            if slot in self.at_work:
                step, began_s = self.at_work[slot]
                ahead += max(0.0, self.clock.needs_s([step]) - (now - began_s))
            slots.append(ahead)
        heapq.heapify(slots)
        for job in self.waiting:
            heapq.heappush(slots, heapq.heappop(slots) + self.clock.needs_s(job))
        longest = max(slots)
        return longest if longest < float("inf") else None


@dataclass
class Clock:
    """How long each kind of stage takes, and so how long the rest will."""

    spent_s: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def saw(self, step: Step, seconds: float) -> None:
        self.spent_s[step.stage] = self.spent_s.get(step.stage, 0.0) + seconds
        self.sizes[step.stage] = self.sizes.get(step.stage, 0) + step.size

    def needs_s(self, steps: Sequence[Step]) -> float:
        """For these steps, one after another; infinity if one is of a kind never timed."""
        total = 0.0
        for step in steps:
            if step.fold is not None:
                continue
            if step.stage not in self.sizes:
                return float("inf")
            total += step.size * self.spent_s[step.stage] / self.sizes[step.stage]
        return total


class Display:
    """A bar for all runs and one for each stage at work, and a line for what has ended."""

    def __init__(self, screen: Any, announce: Announce, queue: Queue, workers: int) -> None:
        self.screen, self.queue, self.workers = screen, queue, workers
        self.announce = announce
        if screen.console.is_terminal:  # above the bars
            self.announce = partial(screen.console.print, markup=False, highlight=False)
        self.overall = screen.add_task("all runs", total=queue.total, note="", ends_s=None)
        self.bars: dict[str, Any] = {}

    def heard(self, item: Any) -> None:
        """News of a bar, or a line that a run printed."""
        if isinstance(item, str):
            self.announce(item)
            return
        if item.title not in self.bars:
            self.bars[item.title] = self.screen.add_task(item.title, total=item.total, note="")
        self.screen.update(self.bars[item.title], completed=item.done, note=item.note)
        if item.done >= item.total:
            self.screen.remove_task(self.bars.pop(item.title))

    def begun(self, step: Step) -> None:
        place = f"[{self.queue.finished + 1}/{self.queue.total}]"
        self.announce(f"{place} {step.run.name}: {step.stage}{self.about()}")

    def done(self, step: Step, seconds: float) -> None:
        place = f"[{self.queue.finished}/{self.queue.total}]"
        took = f"done in {seconds:.0f} s"
        self.announce(f"{place} {step.run.name}: {step.stage} {took}{self.about()}")

    def failed(self, step: Step, reason: str) -> None:
        self.announce(f"{step.run.name}: {step.stage} FAILED: {reason}")
        for title in [t for t in self.bars if t.startswith(f"{step.run.name}: ")]:
            self.screen.remove_task(self.bars.pop(title))

    def about(self) -> str:
        """', about 1:15 left', for the end of a line; the bar says the same."""
        left_s = self.queue.left_s(self.workers)
        ends_s = None if left_s is None else time.monotonic() + left_s
        done, total = self.queue.finished, self.queue.total
        self.screen.update(self.overall, completed=done, total=total, ends_s=ends_s)
        return "" if left_s is None else f", about {progress.minutes(left_s)} left"


def _one_by_one(queue: Queue, root: Path, announce: Announce, workers: int, threads: int) -> None:
    """In this process."""
    torch.set_num_threads(threads)
    with progress.columns() as screen:
        display = Display(screen, announce, queue, workers)
        progress.send_to(display.heard)
        try:
            while (step := queue.take()) is not None:
                if step.fold is None:
                    display.begun(step)
                _attempt(step, queue, root, display)
        finally:
            progress.send_to(None)


def _attempt(step: Step, queue: Queue, root: Path, display: Display) -> None:
    began_s = time.monotonic()
    try:
        step.take(root)
    except (Exception, SystemExit) as error:
        if isinstance(error, Interrupted):
            raise
        if number := interrupts.told():  # whatever a signal made of it
            raise Interrupted(f"{step.run.name} was stopped", number) from error
        failed = Failed.by(error)
    else:
        queue.done(0, time.monotonic() - began_s)
        display.about()
        return
    free()  # past the error, which held what it happened in
    _give_up(step, failed, queue, root, display, 0)


def _give_up(
    step: Step, failed: Failed, queue: Queue, root: Path, display: Display, slot: int
) -> None:
    try:
        fail(Record(root / step.run.folder_name), step.stage, failed.reason, failed.trace)
    except (OSError, UserError) as error:  # a full disk
        display.announce(f"{step.run.name}: the failure could not be written down: {error}")
    queue.failed(slot)
    display.failed(step, failed.reason)
    display.about()


def _side_by_side(queue: Queue, root: Path, announce: Announce, workers: int, threads: int) -> None:
    """In a process per worker. Here only news is received and shown, in bars that come and go."""
    with progress.columns() as screen:
        display = Display(screen, announce, queue, workers)

        def ended(slot: int, step: Step, end: Done | Failed) -> None:
            if isinstance(end, Failed):
                _give_up(step, end, queue, root, display, slot)
                return
            queue.done(slot, end.result)
            if step.fold is None:
                display.done(step, end.result)

        def stopping(number: int) -> None:
            display.announce(
                "stopping: runs finish the step they are at and save it; a second signal stops all "
                "at once"
            )

        supervise(
            workers, threads, partial(_setup, root), queue.take, ended, display.heard, stopping
        )


def _setup(root: Path, say: Callable[[Any], None]) -> Work:
    """A worker: its bars, and all that it prints, are shown by the process that began it."""
    progress.send_to(say)

    def work(step: Step) -> float:
        began_s = time.monotonic()
        with contextlib.redirect_stdout(Lines(step.run.name, say)) as printed:
            try:
                step.take(root)
            finally:
                printed.finish()
        return time.monotonic() - began_s

    return work


class Lines(io.TextIOBase):
    """What a run prints, line by line and each with its name."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self.say, self.begun = name, say, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *whole, self.begun = (self.begun + text).split("\n")
        for line in whole:
            if line.strip():
                named = line.startswith(f"{self.name}: ")
                self.say(line if named else f"{self.name}: {line}")
        return len(text)

    def finish(self) -> None:
        """A last line may have no end."""
        if self.begun:
            self.write("\n")


def conclude(study: Study, root: Path, *, unfolded: bool = False) -> Outcome:
    """The tables and the page of a study, of those of its runs that are done.

    With `unfolded` also whether equivalent runs, each trained by itself, came to the same.
    """
    absent = {each.name: each for each in lacking(study, root)}
    runs = tuple(run for run in study.runs if run.name not in absent)
    unjudged = list(_unjudged(study, absent))
    if not runs:
        return Outcome(pd.DataFrame(), [], None, [], list(absent.values()), unjudged)
    pairs = tuple(pair for pair in study.pairs if not set(pair) & set(absent))
    whole = replace(study, runs=runs, pairs=pairs)
    results, verdicts = analyse(whole, root)
    compared = compare(whole, root) if unfolded else []
    report = page.write(study, root, results, verdicts, list(absent.values()), unjudged)
    return Outcome(results, verdicts, report, compared, list(absent.values()), unjudged)


def lacking(study: Study, root: Path) -> list[Missing]:
    """The runs of a study that are not done."""
    found = [missing(run.name, Record(root / run.folder_name)) for run in study.runs]
    return [each for each in found if each is not None]


def _unjudged(study: Study, absent: Mapping[str, Missing]) -> Iterator[str]:
    for pair in study.pairs:
        if lacks := [f"{name} {absent[name].sentence}" for name in pair if name in absent]:
            yield f"{pair[0]} and {pair[1]}: not available, since {'; '.join(lacks)}"
