"""All parts in order, two processes at a time where they do not need each other."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from lyco_lab.errors import UserError
from lyco_lab.files import writing
from lyco_lab.miniature import judges
from lyco_lab.miniature.pretrain import (
    assemble,
    autoencoder,
    card,
    denoiser,
    material,
    quality,
    text,
)
from lyco_lab.miniature.pretrain import judges as judging
from lyco_lab.miniature.pretrain.recipe import FULL, QUICK, Recipe

Say = Callable[[str], None]
Refined = tuple[AutoencoderKL, CLIPTextModel, CLIPModel]
REFINED = "refined"  # exists once the encoders are


def pretrain(out: Path, *, quick: bool = False, say: Say = print) -> dict[str, object]:
    """Make the miniature in `out` (a pipeline's folder) and return its quality table.

    Checkpoints are kept in `OUT-work`; run again after a kill, it goes on from them.
    """
    out = Path(out)
    if (out / "model_index.json").exists():
        raise UserError(f"{out} already holds a model: name another folder")
    recipe, work = (QUICK, FULL)[not quick], out.with_name(out.name + "-work")
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    say(f"pictures: {recipe.pictures + recipe.concept_pictures} to draw, then kept in {work}")
    material.training(work, recipe)
    material.concept_training(work, recipe)
    _together(_make_autoencoder, _make_text, work, recipe)
    _together(_make_denoiser, _make_judges, work, recipe)
    return finish(out, work, recipe, say, hours=(time.monotonic() - began) / 3600)


def finish(out: Path, work: Path, recipe: Recipe, say: Say, hours: float) -> dict[str, object]:
    """Gather what the parts left in `work`, save it to `out`, and measure it as a user loads it."""
    words, first, refined = _encoders(work, recipe)
    vae, encoder, clip = refined()
    unet = denoiser.train(work, recipe, words, first, lambda: (vae, encoder))
    unet = denoiser.train_detail(work, recipe, words, (vae, encoder), unet)
    pipe = assemble.pipeline(autoencoder.polish(work, recipe, vae), words, encoder, unet)
    networks: dict[str, nn.Module] = {
        "oracle": judging.train_oracle(work, recipe),
        "gram": judging.train_gram(work, recipe),
        "embedder": judging.train_embedder(work, recipe),
    }
    assemble.save(out, pipe, clip, networks)
    say("quality: drawing and judging pictures of unseen captions")
    loaded = StableDiffusionPipeline.from_pretrained(out)
    found = quality.table(loaded, judges.load(out), recipe.judged_captions)
    quality.write(out, found)
    card.write(out, found, recipe, hours)
    return found


def _together(
    first: Callable[[Path, Recipe], None], second: Callable[[Path, Recipe], None], work: Path,
    recipe: Recipe,
) -> None:  # fmt: skip
    """Both in processes of their own, one thread each: small networks gain nothing from two."""
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_alone, args=(job, work, recipe)) for job in (first, second)]
    for job in jobs:
        job.start()
    while any(job.is_alive() for job in jobs):
        if any(job.exitcode for job in jobs):  # one waits for the other: do not let it wait forever
            for job in jobs:
                job.terminate()
        time.sleep(0.2)
    if any(job.exitcode for job in jobs):
        raise RuntimeError(f"a part of the pretraining failed; checkpoints are in {work}")


def _alone(job: Callable[[Path, Recipe], None], work: Path, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    job(work, recipe)


def _make_autoencoder(work: Path, recipe: Recipe) -> None:
    autoencoder.train(work, recipe)


def _make_text(work: Path, recipe: Recipe) -> None:
    text.train(work, recipe)


def _encoders(
    work: Path, recipe: Recipe
) -> tuple[CLIPTokenizer, denoiser.Reader, Callable[[], Refined]]:
    """The tokenizer, the first encoders of pictures and captions, and the way to refined ones."""
    vae = autoencoder.train(work, recipe)
    words, clip = text.train(work, recipe)

    def refined() -> Refined:
        sharp = text.sharpen(work, recipe, words, clip)
        return autoencoder.refine(work, recipe, vae), assemble.text_encoder(sharp), sharp

    return words, (vae, assemble.text_encoder(clip)), refined


def _make_denoiser(work: Path, recipe: Recipe) -> None:
    words, first, refined = _encoders(work, recipe)

    def wait() -> denoiser.Reader:
        while not (work / REFINED).exists():  # the process beside this one is at it
            time.sleep(1)
        return refined()[:2]

    unet = denoiser.train(work, recipe, words, first, wait)
    denoiser.train_detail(work, recipe, words, wait(), unet)


def _make_judges(work: Path, recipe: Recipe) -> None:
    vae = _encoders(work, recipe)[2]()[0]
    (work / REFINED).touch()
    autoencoder.polish(work, recipe, vae)
    judging.train_oracle(work, recipe)
    judging.train_gram(work, recipe)
    judging.train_embedder(work, recipe)
