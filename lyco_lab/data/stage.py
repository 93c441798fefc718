"""The first stage of a run: its images on disk, and every one of them readable.

A concept of the miniature world is written to the run's own `data/`; pictures of the user's stay
where they are, and images.csv says of each file what became of it. Either way a digest is noted:
training refuses images that changed since.

What is learned of a user's files, their latents and text states is kept in `cache/` beside the
runs, for all of them.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lyco_lab.config import Run
from lyco_lab.data import cache, own
from lyco_lab.data.cache import Cache
from lyco_lab.data.concepts import Concept
from lyco_lab.data.folder import Dataset, read, read_image
from lyco_lab.data.memo import Memo
from lyco_lab.data.order import arithmetic
from lyco_lab.data.own import OwnDataset
from lyco_lab.data.stored import Samples, Stored
from lyco_lab.diffusion.model import Diffusion, fingerprint
from lyco_lab.diffusion.skeleton import image_side
from lyco_lab.errors import UserError
from lyco_lab.miniature import concepts, placed
from lyco_lab.record import Record

STAGE = "data"
CACHE = "cache"  # beside the runs
WORLD_SEED = 0  # the images are part of the question: runs of every seed train on the same ones


def prepare(run: Run, record: Record) -> None:
    if not record.pending(STAGE):
        return
    if run.data.concept is not None:
        concepts.write(concepts.concept(run.data.concept), record.path / STAGE, WORLD_SEED)
        found = _read(run, record)
        for item in found.items:
            read_image(item.file)
        facts: dict[str, Any] = {
            "digest": found.digest(),
            "images": len(found.items),
            "samples_per_epoch": found.samples_per_epoch,
        }
    else:
        samples = _samples(run, record, table=record.path / own.TABLE)
        say(run, samples)
        index = samples.index
        facts = {
            "digest": index.digest(samples.digests),
            "images": int((~index.prior_N).sum()),
            "prior_images": int(index.prior_N.sum()),
            "dropped_images": len(index.dropped),
            "samples_per_epoch": int(index.repeats_N[~index.prior_N].sum()),
        }
    record.finish(STAGE, **facts, model=fingerprint(placed(run.model)))


def say(run: Run, samples: Samples) -> None:
    """What was found, and what a step is; each line with the run's name, as several may speak."""
    index = samples.index
    lines = own.report(index, samples.sizes_E2[: len(index)])
    lines.append(
        arithmetic(
            int((~index.prior_N).sum()),
            int(index.repeats_N[~index.prior_N].sum()),
            batch_size=run.train.batch_size,
            accumulation=run.train.accumulate,
            prior_share=samples.prior_share,
            steps=run.train.steps,
        )
    )
    if any(source.captions.drawn for source in index.sources):
        lines.append(
            "tags are drawn anew in each step, so text states are not kept: the text encoder reads "
            "the captions in each step"
        )
    print("".join(f"{run.name}: {line}\n" for line in lines), end="", flush=True)


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
    if run.data.concept is None:
        samples = _samples(run, record)
        _compare(samples.index.digest(samples.digests), record, place(run))
        return own.dataset_of(samples, place(run), record.path.parent / CACHE)
    record.require(STAGE)  # its captions and attributes, as well as the pixels
    found = _read(run, record)
    _compare(found.digest(), record, found.folder)
    return found


def beside(run: Run, record: Record) -> Dataset:
    """A user's images that the run of this folder looks at without training on them."""
    return own.dataset_of(_samples(run, record), place(run), record.path.parent / CACHE)


class Seen(NamedTuple):
    """A user's images, by what their files' headers say."""

    images: int
    samples_per_epoch: int
    concepts: tuple[Concept, ...]
    report: tuple[str, ...]  # lines on what was found, left out, and used as captions


def look(run: Run) -> Seen:
    """What there is, without reading it all; writes nothing.

    What cannot be used is an error here as it will be then.
    """
    index, _ = own.index_of(run.data, run.train.batch_size, model_side(run), Memo())
    own.judge(index, run.data)
    ours = ~index.prior_N
    concepts = own.Items(index, place(run).resolve().name).concepts
    head, *more = index.report()
    report = (f"{place(run)}: {head}", *more)
    return Seen(int(ours.sum()), int(index.repeats_N[ours].sum()), concepts, report)


def material(run: Run, images: Dataset, diffusion: Diffusion) -> Cache | Stored:
    """All that training reads of the images: latents, texts, and the order of batches."""
    frozen = not run.reads_texts
    if not isinstance(images, OwnDataset):
        return cache.build(diffusion, images, text_states=frozen)
    live = run.data.latents == "live"
    return Stored(
        images.samples,
        diffusion,
        images.cache,
        text_states=frozen,
        cached=not live,
        random_crop=run.data.crop == "random",
        precision="fp32" if live else run.data.latents,
    ).build()


def place(run: Run) -> Path:
    """Where the user's pictures are, or what describes them."""
    return Path(run.data.folder or str(run.data.toml))


def _compare(now: str, record: Record, where: Path) -> None:
    if now != record.facts(STAGE)["digest"]:
        raise UserError(
            f"the images or captions in {where} changed since this run began: put them "
            f"back, or delete {record.path} to begin again"
        )


def _samples(run: Run, record: Record, table: Path | None = None) -> Samples:
    memo = Memo(record.path.parent / CACHE / "files.arrow")
    return own.samples_of(run.data, run.train.batch_size, model_side(run), memo, table)


def model_side(run: Run) -> int:
    """The side of the images the model was trained on, from its configuration alone."""
    return image_side(placed(run.model))


def _read(run: Run, record: Record) -> Dataset:
    return read(record.path / STAGE, run.data.repeats, run.data.limit)
