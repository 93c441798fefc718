"""Models on disk: a `Diffusion` from what a study says of its model, and their fingerprint."""

import hashlib
import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lyco_lab.config import Model
from lyco_lab.diffusion.base import Diffusion, Latents, Sizes, quiet
from lyco_lab.diffusion.families import of
from lyco_lab.diffusion.objective import Objective, Velocity, of_scheduler
from lyco_lab.diffusion.sources import find
from lyco_lab.diffusion.sources.base import Source
from lyco_lab.errors import UserError

__all__ = ["Diffusion", "Latents", "Sizes", "fingerprint", "load", "network", "objective", "opened"]

MEGABYTE = 2**20
CLIP_WINDOW = 77  # where a configuration does not say it
# Settings that change what a model does.
CHOICES = (
    "weights", "prediction", "zero_terminal_snr", "tokenizer", "clip_skip", "max_token_length",
)  # fmt: skip
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # as diffusers has it

Named = Model | str | Path  # a path alone means the defaults of all settings


def opened(model: Named) -> tuple[Source, type[Diffusion]]:
    """Where the model's parts are, and its family; reads no weights."""
    source = find(model if isinstance(model, Model) else Model(path=str(model)))
    family, skip = of(source), source.model.clip_skip
    if skip != 1 and not family.skips_layers:
        raise UserError(
            f"model.clip_skip is {skip}, but {source.name} is of the family "
            f"{family.__name__.lower()!r}, whose text encoders' layers are chosen already: needs 1"
        )
    chunks(source, family)
    return source, family


def sound(model: Named) -> None:
    """Raise the errors that need no weights to be seen, as `load` would."""
    source, family = opened(model)
    given(source, family)
    scheduled(source)


def given(source: Source, family: type[Diffusion]) -> list[str]:
    """The tokenizers and networks that the model has, which have to be all but the optional."""
    found = [part for part in (*family.words, *family.networks) if present(source, family, part)]
    missing = source.missing([*found, "vae", "scheduler"])
    if missing:
        raise UserError(f"{source.name} is not a whole model: it has no {', '.join(missing)}")
    return found


def load(model: Named, dtype: torch.dtype = torch.float32) -> Diffusion:
    """The model, all parts in `dtype` but the VAE. It is never fetched from anywhere."""
    source, family = opened(model)
    parts, (schedule, predicted) = given(source, family), scheduled(source)
    made: dict[str, Any] = {"schedule": schedule, "objective": predicted, "dtype": dtype}
    made["chunks"] = chunks(source, family)
    with quiet():
        for part in parts:
            if part in family.networks:
                made[part] = network(source, family, part, dtype)
            else:
                words = family.words[part]
                made[part] = source.tokenizer(imported(words.cls), part, words.pad)
        made["vae"] = source.network(imported("diffusers.AutoencoderKL"), "vae", torch.float32)
    diffusion = family(**made, **family.more(source))
    check(source, diffusion)
    for module in (*diffusion.parts.values(), diffusion.vae):
        module.requires_grad_(False).eval()
    if not torch.cuda.is_available() and hasattr(diffusion, "unet"):
        from diffusers.models.attention_processor import AttnProcessor

        # On a CPU the fused attention's backward pass is slower than the plain one.
        diffusion.denoiser.set_attn_processor(AttnProcessor())
    return diffusion


def objective(model: Named) -> Objective:
    """What the model predicts; reads no weights."""
    return scheduled(opened(model)[0])[1]


def scheduled(source: Source) -> tuple[dict[str, Any], Objective]:
    """The noise of a model, as a diffusers scheduler is configured, and what it predicts."""
    schedule, zero_snr = source.schedule(), source.model.zero_terminal_snr
    if zero_snr and schedule.get("rescale_betas_zero_snr"):
        raise UserError(
            f"model.zero_terminal_snr is true, and {source.name} says so already: leave it out"
        )
    if zero_snr:
        schedule = {**schedule, **ZERO_SNR}
    found = of_scheduler(schedule, source.model.prediction or source.prediction, source.name)
    if zero_snr and not isinstance(found, Velocity):
        raise UserError(
            f"model.zero_terminal_snr is true, but {source.name} predicts {found.name!r}: where "
            "there is noise alone, only a velocity says anything of the image"
        )
    return schedule, found


def chunks(source: Source, family: type[Diffusion]) -> int:
    """Into how many chunks texts are cut (long_text.py); reads no weights."""
    asked = source.model.max_token_length
    if asked is None:
        return 1
    if not family.joins_chunks:
        raise UserError(
            f"model.max_token_length is {asked}, but {source.name} is of the family "
            f"{family.__name__.lower()!r}, whose texts have a length of their own: needs null"
        )
    tokens: int = source.config("text_encoder").get("max_position_embeddings", CLIP_WINDOW) - 2
    if asked % tokens:
        raise UserError(
            f"model.max_token_length is {asked}, but the text encoder of {source.name} reads "
            f"{tokens} tokens at once, beside begin and end: needs null, {tokens}, {2 * tokens}, "
            f"{3 * tokens} or another multiple"
        )
    return asked // tokens


def network(source: Source, family: type[Diffusion], part: str, dtype: torch.dtype | None) -> Any:
    """A denoiser or text encoder with its weights; without them, where `dtype` is None."""
    cls = imported(family.networks[part])
    made: Any = source.skeleton(cls, part) if dtype is None else source.network(cls, part, dtype)
    skip = source.model.clip_skip - 1
    if skip and part.startswith("text_encoder"):
        encoder = made.get_submodule("encoder")
        if skip >= len(encoder.layers):
            raise UserError(
                f"model.clip_skip is {skip + 1}, but the text encoder of {source.name} has "
                f"{len(encoder.layers)} layers: needs at most that"
            )
        # What comes after the layer that is used, could be neither trained nor seen.
        del encoder.layers[-skip:]
        made.config.num_hidden_layers = len(encoder.layers)
    return made


def imported(name: str) -> Any:
    """A class of diffusers or transformers; both take seconds to import, so only when needed."""
    library, _, cls = name.partition(".")
    return getattr(importlib.import_module(library), cls)


def present(source: Source, family: type[Diffusion], part: str) -> bool:
    """Whether the model has a part, as far as it may lack it."""
    return part not in family.optional or source.has(part)


def check(source: Source, diffusion: Diffusion) -> None:
    """Models of a known layout that are made for something else."""
    takes = diffusion.denoiser.config.in_channels
    channels = diffusion.vae.config.latent_channels
    if takes != channels:
        raise UserError(
            f"{source.name} takes {takes} channels where its VAE gives {channels}: it is no "
            "text-to-image model, but one for inpainting or the like"
        )
    for name in [name for name in diffusion.words if getattr(diffusion, name) is not None]:
        known = len(getattr(diffusion, name))
        embedded = getattr(diffusion, name.replace("tokenizer", "text_encoder")).config.vocab_size
        # Some embeddings are padded to a round number; a folder without files makes no words.
        if not embedded // 2 < known <= embedded:
            raise UserError(
                f"the {name} of {source.name} knows {known} tokens, its text encoder {embedded}: "
                "they do not belong together, or the tokenizer's files are missing"
            )
    read = (source.model.max_token_length or 0) // diffusion.chunks + 2
    for name, tokenizer in diffusion.tokenizers.items():
        if diffusion.chunks > 1 and tokenizer.model_max_length != read:
            raise UserError(
                f"model.max_token_length is {source.model.max_token_length}, which is "
                f"{diffusion.chunks} times {read - 2}, but the {name.replace('ids', 'tokenizer')} "
                f"of {source.name} is made for {tokenizer.model_max_length} tokens: needs null"
            )
    if getattr(diffusion.vae.config, "latents_mean", None) is not None:
        raise UserError(f"the latents of {source.name} are normalised by channel: not supported")


def fingerprint(model: Named) -> str:
    """Eight hex digits that change with the model's weights and with the settings on using them.

    Of each weight file: name, size, and the first and last megabyte. All of a full-size model
    would take a minute to read, and another training moves these bytes too.
    """
    source, family = opened(model)
    digest = hashlib.blake2b(digest_size=4)
    for name, file in source.files([*family.networks, "vae"]).items():
        size = file.stat().st_size
        digest.update(f"{name}:{size}".encode())
        with file.open("rb") as opened_file:
            digest.update(opened_file.read(MEGABYTE))
            opened_file.seek(max(0, size - MEGABYTE))
            digest.update(opened_file.read())
    defaults = asdict(Model())
    chosen = {k: v for k, v in asdict(source.model).items() if k in CHOICES and v != defaults[k]}
    if chosen:
        digest.update(json.dumps(chosen).encode())
    return digest.hexdigest()
