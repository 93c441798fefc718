"""The first stage of a run: its images on disk, and every one of them readable.

A concept of the miniature world is written to the run's own `data/`; a folder of the user's stays
where it is. Either way its digest is noted: training refuses images that changed since.
"""

from pathlib import Path

from lyco_lab.config import Run
from lyco_lab.data.folder import Dataset, read, read_image
from lyco_lab.diffusion.model import fingerprint
from lyco_lab.errors import UserError
from lyco_lab.miniature import concepts, placed
from lyco_lab.record import Record

STAGE = "data"
WORLD_SEED = 0  # the images are part of the question: runs of every seed train on the same ones


def prepare(run: Run, record: Record) -> None:
    if record.done(STAGE):
        return
    if run.data.concept is not None:
        concepts.write(concepts.concept(run.data.concept), record.path / STAGE, WORLD_SEED)
    found = _read(run, record)
    for item in found.items:
        read_image(item.file)
    record.finish(
        STAGE,
        digest=found.digest(),
        images=len(found.items),
        samples_per_epoch=found.samples_per_epoch,
        model=fingerprint(placed(run.model)),
    )


def check_model(run: Run, record: Record) -> None:
    """A run that began on other weights than the model's present ones is not this run."""
    if not record.done(STAGE):
        return
    then, now = record.facts(STAGE)["model"], fingerprint(placed(run.model))
    if then != now:
        raise UserError(
            f"{record.path} began on other weights of {run.model.path!r} (fingerprint "
            f"{then}, now {now}): delete the folder to train again, or write elsewhere with --out"
        )


def dataset(run: Run, record: Record) -> Dataset:
    """The images of a run whose data stage is done, unchanged since."""
    noted = record.facts(STAGE)["digest"]
    found = _read(run, record)
    if found.digest() != noted:
        raise UserError(
            f"the images or captions in {found.folder} changed since this run began: put them "
            f"back, or delete {record.path} to begin again"
        )
    return found


def _read(run: Run, record: Record) -> Dataset:
    folder = record.path / STAGE if run.data.concept is not None else Path(str(run.data.folder))
    return read(folder, run.data.repeats, run.data.limit)
