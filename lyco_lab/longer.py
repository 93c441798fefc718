"""A run that is another one with more steps begins where that one ended.

    lyco-lab run STUDY train.steps=500      later with train.steps=2000: trains the other 1500
    grid: {train.steps: [500, 2000]}        trains 2000 steps in all, and leaves both adapters
    lyco-lab run STUDY --no-fold            every run trains from its first step

What a step does depends on its number, the seed and the state before it, and on no generator that
runs on. So where the learning rate does not look at the last step either, which it does in every
schedule but the constant one, two configurations that differ in `train.steps` alone are one
training, looked at after N' and after N steps: to the last bit, as a run that was stopped and goes
on. The shorter one need not be of the same study; its folder has to be beside this one's, from the
same images and weights, with the checkpoint of its last step.

    NAME-HASH/train/metrics.csv      begins with the rows of the other
    NAME-HASH/train/samples/         and the samples, by hard links where the disk has them
    NAME-HASH/train/checkpoints/     its last one
    NAME-HASH/train/began.txt        whose steps these are

Runs that a study names in its `pairs` train from their first step.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lyco_lab.config import Run
from lyco_lab.files import atomic
from lyco_lab.fold import DATA, LOOKED_AT, TRAIN, link, trained
from lyco_lab.integrity import METRICS
from lyco_lab.readers import Damaged
from lyco_lab.record import CONFIG, Record, identity, read_config
from lyco_lab.tracking import track
from lyco_lab.train import journal
from lyco_lab.train.callbacks import NORM_EVERY, shown
from lyco_lab.train.checkpoint import Checkpoints, State, read

SAID = "began.txt"
UNREADABLE = (math.inf, "")


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    folder: str  # of the shorter run, beside its own
    steps: int  # that it has trained

    @property
    def sentence(self) -> str:
        return f"step {self.steps} of {self.folder.rsplit('-', 1)[0]}"


def lines(runs: Sequence[Run], fresh: Collection[str] = ()) -> list[list[Run]]:
    """The runs, in lists in which each goes on from the one before it; in order of the first.

    `fresh`: names of those that begin at 0 in any case.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        alone = run.name in fresh or not can(run)
        found.setdefault(run.hash if alone else _but_steps(run), []).append(run)
    return [sorted(line, key=lambda run: run.train.steps) for line in found.values()]


def can(run: Run) -> bool:
    """Whether its first steps do not depend on how many there are."""
    return run.train.schedule == "constant" and not run.trainer.callbacks


def starts(runs: Sequence[Run], root: Path, fresh: Collection[str] = ()) -> dict[str, Start]:
    """By name, where each run that is to train will begin, unless at 0; creates nothing."""
    found = {}
    for line in lines(runs, fresh):
        before: Run | None = None
        for run in line:
            record = Record(root / run.folder_name)
            if run.name not in fresh and not _begun(record):
                here = [Start(before.folder_name, before.train.steps)] if before else []
                there = [start for start, _ in _shorter(run, root)]
                if here or there:
                    found[run.name] = max(here + there, key=lambda start: start.steps)
            before = run
    return found


def begin(run: Run, record: Record) -> None:
    """Take over the steps of the longest such run that is done, unless this one has begun."""
    if _begun(record):
        return
    root = record.path.parent
    for start, other in sorted(_shorter(run, root), key=lambda each: -each[0].steps):
        state = _whole_state(other, start.steps)
        if state is None or not _of_the_same(record, other):
            continue
        folder = record.path / TRAIN
        print(f"{run.name}: goes on from {start.sentence}")
        rows = journal.rows(other.output(TRAIN, METRICS), start.steps)
        if start.steps % NORM_EVERY:
            rows[-1]["delta_norm"] = None  # it is there because the other ended with it
        with atomic(folder / SAID) as temporary:
            temporary.write_text(f"Steps 1 to {start.steps} were trained in {start.folder}.\n")
        for sample in sorted((other.path / TRAIN / "samples").glob("*.png")):
            with atomic(folder / "samples" / sample.name) as temporary:
                link(sample, temporary)
        with track(run, record, TRAIN) as tracker:
            for row in rows:
                tracker.log(int(row["step"] or 0), shown(row))
        journal.write(folder / "metrics.csv", rows)
        # Last, since with it the run has begun.
        digest = journal.digests(folder / "metrics.csv")[-1]
        Checkpoints.of(record).save(replace(state, rows=digest))
        return


def _begun(record: Record) -> bool:
    return record.done(TRAIN) or bool(Checkpoints.of(record).files())


def _shorter(run: Run, root: Path) -> Iterator[tuple[Start, Record]]:
    """Trained runs below `root` that are this one with fewer steps."""
    if not can(run):
        return
    wanted = _but_steps(run)
    for mark in sorted(root.glob(f"*/done/{TRAIN}.json")):
        record = Record(mark.parents[1])
        steps, rest = _read(record.path)
        if steps < run.train.steps and rest == wanted and trained(record):
            yield Start(record.path.name, int(steps)), record


def _whole_state(other: Record, steps: int) -> State | None:
    """The last state of a run that is done; None if that or the rows beside it are damaged."""
    file = Checkpoints.of(other).file(steps)
    try:
        other.output(TRAIN, METRICS)
        return read(other.output(TRAIN, file.relative_to(other.path).as_posix()))
    except Damaged as error:
        print(f"{error}: nothing goes on from it")
        return None


def _of_the_same(record: Record, other: Record) -> bool:
    """Equal settings say nothing of images or weights that were changed in between."""
    ours, theirs = record.facts(DATA), other.facts(DATA)
    return all(ours[fact] == theirs[fact] for fact in LOOKED_AT)


def _but_steps(run: Run) -> str:
    return _without_steps(run.to_dict())


def _without_steps(config: Mapping[str, Any]) -> str:
    train = {key: value for key, value in config["train"].items() if key != "steps"}
    return json.dumps(identity({**config, "train": train}), sort_keys=True, default=str)


def _read(folder: Path) -> tuple[float, str]:
    """The steps of a run's configuration, and the rest; (inf, "") where it cannot be read."""
    file = folder / CONFIG
    return _read_once(folder, file.stat().st_mtime_ns) if file.is_file() else UNREADABLE


@lru_cache(maxsize=1024)
def _read_once(folder: Path, _changed_ns: int) -> tuple[float, str]:
    try:
        config = read_config(folder)
        return UNREADABLE if config is None else (config["train"]["steps"], _without_steps(config))
    except (KeyError, TypeError):  # of another version
        return UNREADABLE
