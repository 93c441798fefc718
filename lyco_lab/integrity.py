"""Whether the outputs of done stages still stand, and what has to be made again where they do not.

    lyco-lab check [RUN...]     list what is damaged or missing; changes nothing
    lyco-lab run STUDY          mends it before anything else (`mend`): a damaged output is deleted,
                                its stage is no longer done, and carrying it out makes anew what is
                                missing and nothing else

A finished training is not repeated for the sake of what only warm starts and people look at
(checkpoints, samples): they are struck off the list of its outputs.
"""

from collections.abc import Iterator
from pathlib import Path

from lyco_lab.errors import UserError, nearest
from lyco_lab.files import locked
from lyco_lab.readers import read_json
from lyco_lab.record import CONFIG, STAGES, Record, read_config

BASE = "base"  # beside the folders of runs: images of models without an adapter
CHECKPOINTS = "train/checkpoints"
METRICS = "train/metrics.csv"


def mend(record: Record) -> list[str]:
    """Declare not done whatever stage is damaged, and delete its damaged outputs.

    Returns a sentence for each fault.
    """
    if not (record.path / "done").is_dir():
        return []
    with locked(record.path):
        return [line for stage in record.marked() for line in _mend_stage(record, stage)]


def _mend_stage(record: Record, stage: str) -> Iterator[str]:
    if not record.done(stage):
        file = record.mark_file(stage)
        if is_of_an_earlier_version(file):
            record.mark(stage)  # raises an error that says what to do
        file.unlink()
        yield f"{file} is damaged: the stage {stage} is checked and finished again"
        return
    faults = record.faults(stage)
    spare = [fault for fault in faults if fault.spare]
    needed = [fault for fault in faults if not fault.spare]
    for fault in faults:
        if fault.path.is_dir() and not fault.path.is_symlink():
            raise UserError(f"{fault.path} was a file and is a folder: move it away and run again")
    for fault in faults:
        fault.path.unlink(missing_ok=True)
    if spare:
        record.drop(stage, [fault.name for fault in spare])
        yield from (f"{fault}: it is not made again, as no result needs it" for fault in spare)
    if needed:
        if any(fault.name == METRICS for fault in needed):
            # A checkpoint goes on from its rows, and these are known from training alone.
            for state in (record.path / CHECKPOINTS).glob("*"):
                state.unlink()
        record.undo(stage)
        yield from (f"{fault}: it is made again" for fault in needed)


def damage(root: Path, names: list[str]) -> Iterator[str]:
    """A line for each file below `root` that is damaged or missing, of these runs or of all."""
    found = records(root, names)
    lost = dict.fromkeys(file for record in found for file in lost_marks(record))
    yield from (f"{file} is missing, and later stages have read what it lists" for file in lost)
    for record in found:
        if record.path.parent != root / BASE and read_config(record.path) is None:
            yield f"{record.path / CONFIG} is missing or damaged"
        for stage in record.marked():
            try:
                record.mark(stage)
            except UserError as error:
                yield str(error)
            else:
                yield from map(str, record.faults(stage))


def lost_marks(record: Record) -> Iterator[Path]:
    """Marks that are gone, of stages that the marks of later ones name."""
    for stage in record.marked():
        mark = record.mark(stage) if record.done(stage) else None
        for name in (*mark.reads, *mark.beside) if mark else ():
            folder, _, other = name.rpartition("/")
            file = (Record(record.path.parent / folder) if folder else record).mark_file(other)
            if not file.is_file():
                yield file


def records(root: Path, names: list[str]) -> list[Record]:
    """The runs of these names (those of their folders, or patterns), or all, and what they share.

    Raises `UserError` for a name that fits none.
    """
    runs = sorted(p for p in root.glob("*/") if (p / "done").is_dir() or (p / CONFIG).is_file())
    shared = sorted(p for p in (root / BASE).glob("*/") if p.is_dir())
    if not names:
        return [Record(path) for path in (*runs, *shared)]
    found: dict[Path, None] = {}
    for name in names:
        wanted = Path(name).name
        fits = [p for p in runs if p.match(wanted) or p.name.rpartition("-")[0] == wanted]
        if not fits:
            known = [name for p in runs for name in (p.name.rpartition("-")[0], p.name)]
            raise UserError(f"{name!r} is no run in {root}{nearest(wanted, known)}")
        found |= dict.fromkeys(fits)
    for path in list(found):
        found |= dict.fromkeys(folder.path for folder in shared_with(Record(path)))
    return [Record(path) for path in found]


def shared_with(record: Record) -> list[Record]:
    """The folders beside a run's whose stages its own have read or taken care of."""
    marks = [record.mark(stage) for stage in STAGES if record.done(stage)]
    names = [other for mark in marks for other in (*mark.reads, *mark.beside) if "/" in other]
    folders = dict.fromkeys(name.rpartition("/")[0] for name in names)
    return [Record(record.path.parent / folder) for folder in folders]


def is_of_an_earlier_version(file: Path) -> bool:
    try:
        return "checksum" not in read_json(file)
    except UserError:
        return False
