"""The stage: a run's images and a frozen model -> adapter.safetensors.

    train/metrics.csv         a row for each step
    train/checkpoints/        where a run that was stopped goes on from
    train/samples/            images drawn on the way, if asked for
    adapter.safetensors       the result
    embeddings/WORD.safetensors    and the vectors of a word that trained beside it

Everything is done in the process it is called in, unless several devices are to share a batch
(processes.py).
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lyco_lab.adapters.mount import Mounted, attach
from lyco_lab.config import Run
from lyco_lab.config.groups import group_of
from lyco_lab.data.cache import Cache
from lyco_lab.data.folder import Dataset
from lyco_lab.data.stage import beside, dataset, material
from lyco_lab.data.stored import Stored
from lyco_lab.devices import device
from lyco_lab.diffusion import targets, word
from lyco_lab.diffusion.memory import free
from lyco_lab.diffusion.model import Diffusion, load
from lyco_lab.errors import UserError
from lyco_lab.formats import embedding, kohya
from lyco_lab.miniature import placed
from lyco_lab.record import Record
from lyco_lab.settings import without_folders
from lyco_lab.tracking import track
from lyco_lab.train.callbacks import Norms, Rows, Samples, Saving, Stop, Validating, Watching
from lyco_lab.train.checkpoint import Checkpoints, read
from lyco_lab.train.divergence import Divergence
from lyco_lab.train.exact import Inexact, exact
from lyco_lab.train.fitting import fit, orders
from lyco_lab.train.guard import first_factor
from lyco_lab.train.journal import Journal, digests
from lyco_lab.train.module import Training
from lyco_lab.train.plugged import Plugged, plugged
from lyco_lab.train.processes import Process, together
from lyco_lab.train.validation import Validation, split

STAGE = "train"
ADAPTER = "adapter.safetensors"
EMBEDDINGS = "embeddings"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(run: Run, record: Record) -> None:
    """Train what is left of the run's steps and write its adapter."""
    if not record.pending(STAGE):
        return
    try:
        _train(run, record, strict=True)
        return
    except Inexact as error:
        print(f"{error}: training begins again, and claims no bits")
    free()  # past the error, which held what it happened in
    _train(run, record, strict=False)


def _train(run: Run, record: Record, strict: bool) -> None:
    folder = record.path / STAGE
    plugs = plugged(run, folder)
    images = dataset(run, record)
    diffusion = frozen(run)
    mounted = mount(run, diffusion)
    module = training(run, diffusion, mounted)
    checkpoints = Checkpoints.of(record)
    state = checkpoints.latest(digests(folder / "metrics.csv"))
    first = 0 if state is None else state.step
    if state is not None:
        module.load_state(state)
    stop = Stop()
    facts = {
        "trainable_params": sum(m.num_params for m in mounted.values())
        + sum(w.vector_1D.numel() for w in module.words.values()),
        "layers": {part: len(m.layers) for part, m in mounted.items()},
        "dataset_digest": record.facts("data")["digest"],
        "device": diffusion.denoiser.device.type,
        "devices": run.trainer.devices,
    }
    threads, known = (None, ()) if state is None else (state.threads, state.nondeterministic)
    strict = strict and not known
    with (
        exact(threads, strict=strict, operations=known) as exactness,
        Journal(folder / "metrics.csv", first) as journal,
        track(run, record, STAGE, facts | {"threads": exactness.threads}) as tracker,
    ):
        saving = Saving(
            checkpoints,
            journal,
            stop,
            exactness,
            plugs,
            every=run.train.checkpoint_every,
            steps=run.train.steps,
            seconds=0.0 if state is None else state.seconds,
        )
        _check_word(run, diffusion, images)
        shown = material(run, images, diffusion)
        done, ended = first, state is not None and state.ended
        if first < run.train.steps and not ended:
            if shown.cut_captions:
                more = "; model.max_token_length can be larger" if diffusion.joins_chunks else ""
                print(
                    f"{shown.cut_captions} of {len(images.items)} captions are longer than the "
                    f"text encoder reads, and are cut{more}"
                )
            between = [
                *validating(run, record, diffusion, shown),
                *plugs.around(state.callbacks if state else {}, run.train.validate_every),
                Norms(run.train.steps),
                Rows(journal, tracker),
                Samples(run, images.captions, folder / "samples", tracker),
                Watching(Divergence.of(run.train, journal.path, first)),
                saving,
            ]
            others = together(run.trainer.devices, follow, run, record, first, strict)
            with others as process, stop.listening():
                fit(run, module, shown, first, between, process, plugs)
            done = int(module.row.get("step") or first)
            if not done:
                raise UserError("a callback of trainer.callbacks stopped the run before a step")
        else:
            saving.trained = module.exported_digest()
        if done < run.train.steps:
            print(f"a callback stopped the run after step {done} of {run.train.steps}")
        check_export(module, saving.trained, plugs, done)
        with module.exported():
            samples_per_epoch = orders(run, shown)[0].samples_per_epoch
            noted = metadata(run, images, samples_per_epoch, done) | diffusion.described
            kohya.save(record.path / ADAPTER, mounted, noted)
            if not kohya.holds(record.path / ADAPTER, mounted):
                raise UserError(
                    f"{record.path / ADAPTER}, read back, does not hold the factors that were "
                    "written: the disk is not to be trusted; write elsewhere with --out"
                )
            if (file := embedding_file(run, record)) is not None:
                vectors = {part: w.vector_1D for part, w in module.words.items()}
                embedding.save(file, vectors)
        tracker.file(record.path / ADAPTER, f"adapter-{run.hash}", "model")
        facts |= exactness.facts(facts["device"]) | {"steps": done}
        tracker.summary(facts | {"train/seconds": saving.total_seconds()})
    checkpoints.keep(1)  # for a run with more steps
    record.finish(STAGE, train_seconds=saving.total_seconds(), **facts)


def check_export(module: Training, trained: bytes, plugs: Plugged, done: int) -> None:
    """Raise an error unless what is about to be exported is what the last step left.

    `trained`: the digest of the factors at that step's end; empty if no step ended as the last.
    """
    by = f"a callback ({plugs.named})" if plugs.callbacks else "something"
    if not trained:
        raise UserError(
            f"the training ended after step {done} though nothing asked it to: {by} did, and "
            "what stops a run has to set trainer.should_stop"
        )
    if exchanged := module.exchanged():
        raise UserError(
            f"{len(exchanged)} factors, {exchanged[0]} the first, are no longer the parameters "
            f"that were trained: {by} has replaced or frozen them, so their training would be "
            "lost; leave it out of trainer.callbacks"
        )
    if module.exported_digest() != trained:
        raise UserError(
            f"the factors are not those that step {done} left: {by} has changed them after the "
            "last step, so what would be exported was never trained; leave it out of "
            "trainer.callbacks, or have it change factors in on_train_batch_end"
        )
    with module.exported():
        if (name := first_factor(module.factors())) is not None:
            raise UserError(
                f"the factor {name} is not finite after step {done}, the last: it would be useless "
                f"in adapter.safetensors; try a smaller train.lr than {module.settings.lr}"
            )


def follow(
    process: Process, run: Run, record: Record, first: int, strict: bool
) -> Callable[[], None]:
    """What the other processes of a run do: the same, but for writing."""
    diffusion = frozen(run, process.rank)
    module = training(run, diffusion, mount(run, diffusion))
    threads, state = None, None
    if first:
        state = read(Checkpoints.of(record).file(first))
        if state is None:
            raise UserError(
                f"process {process.rank + 1} cannot read the checkpoint of step {first}"
            )
        module.load_state(state)
        threads = state.threads
    shown = material(run, dataset(run, record), diffusion)
    plugs = plugged(run, record.path / STAGE, process.rank)
    between = plugs.around(state.callbacks if state else {}, run.train.validate_every)
    if run.trainer.strategy == "fsdp":  # the first cannot look at weights without the others
        validated = validating(run, record, diffusion, shown, say=lambda line: None)
        between = [*validated, *between, Norms(run.train.steps)]

    def go() -> None:
        with exact(threads, strict=strict):
            fit(run, module, shown, first, between, process, plugs)

    return go


def embedding_file(run: Run, record: Record) -> Path | None:
    """Where the vectors of the run's own word are, if it has one; the word is the file's name."""
    token = run.embedding.token
    return None if token is None else record.path / EMBEDDINGS / f"{token}.safetensors"


def frozen(run: Run, rank: int = 0) -> Diffusion:
    """The run's model, where the process of this rank is to train it."""
    return load(placed(run.model), DTYPES[run.model.precision]).to(
        device(run, rank, run.trainer.devices)
    )


def validating(
    run: Run,
    record: Record,
    diffusion: Diffusion,
    shown: Cache | Stored,
    say: Callable[[str], None] = print,
) -> Iterator[Validating]:
    """What looks at images that are not trained on, if the run wants it."""
    settings = run.train
    if settings.validate_every is None:
        return
    if settings.validation_share is not None:
        order, held = split(shown.order(1, run.seed), settings.validation_share)
        where = f"of {len(order.repeats)} images are held out"
    else:
        other = replace(run, data=run.data.elsewhere(str(settings.validation_folder)))
        shown = material(other, beside(other, record), diffusion)
        order = shown.order(1, run.seed)
        held = list(range(len(order.repeats)))
        where = f"images of {settings.validation_folder} are looked at"
    validation = Validation(shown, order, held, settings.batch_size)
    say(f"{len(held)} {where}, at {validation.draws} timesteps each")
    yield Validating(validation, settings.validate_every)


def mount(run: Run, diffusion: Diffusion) -> dict[str, Mounted]:
    """The run's adapter on each part that trains, as it starts."""
    parts = diffusion.trained(run.model.text_encoder)
    adapter, mounted = run.adapter_value(), {}
    for part, model in parts.items():
        chosen = targets.chosen(model, part, run.model, adapter)
        mounted[part] = attach(
            model,
            adapter,
            chosen.names,
            seed=run.seed,
            options=run.options,
            overrides=chosen.overrides,
            init_scale=partial(_init_scale, run, part),
        )
    return mounted


def _check_word(run: Run, diffusion: Diffusion, images: Dataset) -> None:
    token = run.embedding.token
    if token is None or any(word.occurs(diffusion, token, text) for text in images.captions):
        return
    raise UserError(
        f"embedding.token is {token!r}, but none of the {len(images.items)} captions has that "
        "word: it would never train"
    )


def training(run: Run, diffusion: Diffusion, mounted: dict[str, Mounted]) -> Training:
    """What trains: adapters, and the run's own word if it has one."""
    words: dict[str, word.Word] = {}
    if run.embedding.token is not None:
        starts = word.mean(diffusion, str(run.embedding.init))
        words = word.add(diffusion, run.embedding.token, starts)
    return Training(diffusion, mounted, run.train, run.optimizer_value(), words, run.embedding.lr)


def _init_scale(run: Run, part: str, layer: str, factor: str) -> float:
    return run.train.init_scale * group_of(run.train.groups, f"{part}.{layer}", factor).init_scale


def metadata(run: Run, images: Dataset, samples_per_epoch: int, steps: int) -> dict[str, str]:
    """What the adapter file says of its training; no dates, so equal factors are equal files."""
    train, plain = run.train, without_folders(run.to_dict(), Run)
    epochs = steps * train.samples_per_step / samples_per_epoch
    return {
        "ss_output_name": run.name,
        "ss_seed": str(run.seed),
        "ss_steps": str(steps),
        "ss_epoch": str(math.ceil(epochs)),
        "ss_gradient_accumulation_steps": str(train.accumulate),
        "ss_learning_rate": str(train.lr),
        "ss_optimizer": str(run.optimizer["kind"]),
        "ss_num_train_images": str(samples_per_epoch),
        "ss_sd_model_name": Path(run.model.path).name,
        "modelspec.trigger_phrase": f"{images.trigger} {images.class_word}".strip(),
        "lyco_lab.run": json.dumps(
            {"hash": run.hash, "optimizer": plain["optimizer"], "train": plain["train"]}
        ),
    }
