"""Runs of a study that the theorem on gamma makes one are trained once, and share the result.

    lyco-lab run STUDY              each class of equivalent runs (lyco_lab/gamma.py) trains once
    lyco-lab run STUDY --no-fold    every run trains, those with a shared result as well

A run that takes the result of another has a folder as every run has. Its training images are its
own, and have to be those of the other; what the later stages leave is the other's, by hard links
where the disk has them:

    adapter.safetensors     the same W', as factors of the run that trained, which it names
    train/metrics.csv       its losses and norms; learning rate and gradient norm, which are not
                            the same in both, are left empty
    generate/, evaluate/    its images and their scores
    shared.txt              for people: whose result this is and why; W&B is not told twice
    done/STAGE.json         for later stages: `shared_from`, a folder, and `equivalence`

Runs that a study names in its `pairs` never take the result of another: a pair asks whether two
trainings agree. A run that has trained by itself keeps its result.
"""

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lyco_lab.config import Run, Study
from lyco_lab.errors import UserError
from lyco_lab.files import PART, atomic, locked, writing
from lyco_lab.gamma import Equivalence, classes, differences, equivalent, is_power_of_two
from lyco_lab.record import STAGES, Record, identity

DATA, TRAIN, GENERATE, EVALUATE = STAGES
LEAVES = {  # stage -> what it leaves in a run's folder
    TRAIN: ("train", "adapter.safetensors"),
    GENERATE: ("generate",),
    EVALUATE: ("evaluate",),
}
METRICS = "metrics.csv"
OWN_COLUMNS = ("lr", "lr_text_encoder", "grad_norm")  # of METRICS: they move with the factors
ORIGIN, HOW = "shared_from", "equivalence"  # facts of a stage whose result is shared
BITWISE, ROUNDED = "bit for bit", "up to rounding"
SAID = "shared.txt"
LOOKED_AT = {"digest": "training images", "model": "model's weights"}  # facts of the data stage
ASIDE = "shared"  # keeps a shared result until the run has one of its own


@dataclass(frozen=True)
class Fold:
    """A run that needs no training of its own."""

    run: Run
    source: Run  # the equivalent one, whose result it takes
    equivalence: Equivalence

    @property
    def how(self) -> str:
        return BITWISE if self.equivalence.bitwise else ROUNDED

    @property
    def sentence(self) -> str:
        """What differs between the two, and why it makes no difference."""
        mine, other = (identity(run.to_dict()) for run in (self.run, self.source))
        changed = ", ".join(
            key if isinstance(ours, list) else f"{key} {_short(ours)} for {_short(theirs)}"
            for key, ours, theirs in differences(mine, other)
        )
        return (
            f"{self.run.name} is {self.source.name} with {changed}: "
            f"{_scaled(self.equivalence)}, and W' is the same {self.how}"
        )


@dataclass(frozen=True)
class Folding:
    """What of a study needs no training."""

    runs: int
    classes: int  # of equivalent runs
    folds: Mapping[str, Fold] = field(default_factory=dict)  # by the run's name

    @property
    def sentence(self) -> str:
        """How many, and how many of them take a result."""
        if not self.folds:
            return f"{self.runs} runs"
        needs = "needs no training of its" if len(self.folds) == 1 else "need no training of their"
        said = f"{self.runs} runs, {self.classes} class{'es' if self.classes > 1 else ''}: "
        said += f"{len(self.folds)} {needs} own"
        others = self.runs - self.classes - len(self.folds)
        return said + (f"; {others} train all the same, or have" if others else "")


def folding(study: Study, root: Path) -> Folding:
    """Which runs of a study take the result of which other; creates nothing.

    In each class the one to train is a run that has trained, else one that has a result, else one
    that a pair makes train anyway, else one that has begun, else the first.
    """
    paired = in_pairs(study)
    found = {}
    known = classes(study.runs)
    for members in (each.runs for each in known if len(each.runs) > 1):
        records = {run.name: Record(root / run.folder_name) for run in members}
        own = {name for name, record in records.items() if trained(record)}
        source = max(members, key=lambda run: _standing(records[run.name], run.name in paired))
        for run in members:
            if run is source or run.name in paired | own:
                continue
            record = records[run.name]
            if origin(records[source.name]) == record.path.name:
                continue  # the result is its own, of which something has to be made again
            if record.done(TRAIN) and origin(record) != origin(records[source.name]):
                continue  # it has its result from elsewhere
            verdict = equivalent(source, run)
            if verdict:
                found[run.name] = Fold(run, source, verdict)
    return Folding(len(study.runs), len(known), found)


def _standing(record: Record, paired: bool) -> tuple[bool, ...]:
    has_result = record.done(TRAIN) and not paired
    return trained(record), has_result, paired, (record.path / TRAIN).is_dir()


def in_pairs(study: Study) -> set[str]:
    return {name for pair in study.pairs for name in pair}


def trained(record: Record) -> bool:
    """Whether the run of this folder was trained, and did not take its result from another."""
    return record.done(TRAIN) and ORIGIN not in record.facts(TRAIN)


def shared(record: Record) -> bool:
    """Whether its result is that of another run."""
    return record.done(TRAIN) and not trained(record)


def origin(record: Record) -> str:
    """The folder, beside this one, of the run whose training the result is of."""
    facts = record.facts(TRAIN) if record.done(TRAIN) else {}
    return str(facts.get(ORIGIN, record.path.name))


def whose(run: Run, root: Path) -> str:
    """Of a run that was not trained, whose result it has; "" for one that was."""
    record = Record(root / run.folder_name)
    if not shared(record):
        return ""
    return f"{run.name} is {origin(record)}, the same {record.facts(TRAIN)[HOW]}"


def share(fold: Fold, root: Path, stage: str) -> None:
    """Give a run what `stage` left in the folder of its source, unless it has it."""
    record, source = (Record(root / run.folder_name) for run in (fold.run, fold.source))
    with _both(record, source):
        if record.settled(stage) or not source.settled(stage):
            return
        if stage != TRAIN and (not shared(record) or origin(record) != origin(source)):
            return  # trained by itself in the meantime
        _check_same_images(fold, record, source)
        facts, theirs = source.require(stage), source.mark(stage)
        bitwise = fold.equivalence.bitwise and facts.get(HOW, BITWISE) == BITWISE
        how = BITWISE if bitwise else ROUNDED
        with _staging(record) as staging:
            for name in LEAVES[stage]:
                _copy(source.path / name, staging / name)
                _put(staging, name, record.path)
        if stage == TRAIN:
            with atomic(record.path / SAID) as temporary:
                temporary.write_text(_statement(fold, origin(source), how))
        record.finish(
            stage,
            reads=[name for name in theirs.reads if "/" in name],  # of folders that both use
            beside=theirs.beside,
            **facts | {ORIGIN: origin(source), HOW: how},
        )


def set_aside(record: Record) -> None:
    """Move a shared result, and what was made of it, out of the way of a training of its own.

    The mark of the training goes last of all marks: after a kill this is known to be unfinished.
    """
    with locked(record.path):
        if not shared(record):
            return
        aside = record.path / ASIDE
        aside.mkdir(exist_ok=True)
        for stage in (EVALUATE, GENERATE, TRAIN):
            mark = f"done/{stage}.json"
            said = (SAID,) if stage == TRAIN else ()
            for name in (mark, *LEAVES[stage], *said):
                if (record.path / name).exists():
                    (aside / name).parent.mkdir(exist_ok=True)
                    _remove(aside / name)
                    (record.path / name).rename(aside / name)


def discard(record: Record) -> None:
    """Remove what was set aside, once the run has a result of its own."""
    if trained(record) and all(record.done(stage) for stage in STAGES):
        shutil.rmtree(record.path / ASIDE, ignore_errors=True)
        (record.path / SAID).unlink(missing_ok=True)


def _check_same_images(fold: Fold, record: Record, source: Record) -> None:
    """Equal settings say nothing of a folder whose images were changed between two runs."""
    ours, theirs = record.facts(DATA), source.facts(DATA)
    for fact, what in LOOKED_AT.items():
        if ours[fact] != theirs[fact]:
            raise UserError(
                f"run {fold.run.name!r} cannot take the result of {fold.source.name!r}: the "
                f"{what} changed since that run began ({fact} {theirs[fact]}, now {ours[fact]}); "
                f"train both with --no-fold, or delete {source.path}"
            )


def _statement(fold: Fold, folder: str, how: str) -> str:
    text = f"Not trained: adapter, images and scores here are those of {folder}, the same {how}.\n"
    text += f"{fold.sentence}.\n"
    if fold.source.wandb.mode != "disabled":
        project = fold.source.wandb.project or fold.source.study
        text += f"In W&B it is the run {folder.rsplit('-', 1)[-1]} of the project {project}.\n"
    return text


@contextmanager
def _both(*records: Record) -> Iterator[None]:
    """Hold both folders; always in one order, so that two commands never wait for each other."""
    with ExitStack() as stack:
        for path in sorted(record.path for record in records):
            stack.enter_context(locked(path))
        yield


@contextmanager
def _staging(record: Record) -> Iterator[Path]:
    """A folder inside the run's, for what is not complete and for what is replaced."""
    with writing(record.path):
        staging = Path(tempfile.mkdtemp(prefix=PART, dir=record.path))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        raise UserError(f"{source} is missing: delete {source.parent} to train that run again")
    if source.is_file():
        link(source, target)
        return
    left_out = shutil.ignore_patterns("checkpoints", METRICS, f"{PART}*")
    shutil.copytree(source, target, copy_function=link, ignore=left_out)
    if (source / METRICS).is_file():
        (target / METRICS).write_text(_without_own_columns(source / METRICS))


def link(source: str | Path, target: str | Path) -> None:
    """A second name for a file: files here are replaced and never changed in place."""
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copy2(source, target)


def _put(staging: Path, name: str, folder: Path) -> None:
    """`staging/name` becomes `folder/name`. The stage has no mark yet, so a kill in between is
    a stage that is not done."""
    if (folder / name).exists():
        (folder / name).rename(staging / f"former-{name}")
    (staging / name).rename(folder / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _without_own_columns(metrics: Path) -> str:
    buffer = io.StringIO()
    with metrics.open(newline="") as file:
        rows = csv.DictReader(file)
        writer = csv.DictWriter(buffer, list(rows.fieldnames or ()), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {key: "" for key in OWN_COLUMNS if key in row})
    return buffer.getvalue()


def _scaled(equivalence: Equivalence) -> str:
    """How much larger the factors are than those of the source, in words."""
    by_name: dict[str, set[float]] = {}
    for (_, factor), s in equivalence.scales.items():
        by_name.setdefault(factor, set()).add(s)
    every = set().union(*by_name.values()) if by_name else {1.0}
    if every == {1.0}:
        return "its factors are the same"
    if len(every) == 1:
        return f"its factors are s = {_number(*every)} times as large"
    parts = []
    for factor, scales in by_name.items():
        if scales != {1.0}:
            low, high = _number(min(scales)), _number(max(scales))
            parts.append(f"{factor} {low if low == high else f'{low} to {high}'} times")
    return f"of its factors {', '.join(parts)} as large"


def _number(s: float) -> str:
    """1/4 and 8 where that is what it is, else a few digits."""
    if s < 1 and is_power_of_two(s):
        return f"1/{1 / s:g}"
    return f"{s:.6g}"


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
