"""A run's own training loop, on the accelerator that is not there."""

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loops import fit_loop
from lightning.pytorch.strategies import SingleDeviceStrategy

from lyco_lab.adapters.mount import attach
from lyco_lab.config import Data, Model, Run, Train, Wandb
from lyco_lab.data.cache import Cache
from lyco_lab.diffusion.base import Diffusion, Latents, Sizes
from lyco_lab.diffusion.model import load
from lyco_lab.train import fitting
from lyco_lab.train.callbacks import Norms, Rows, Validating, Watching
from lyco_lab.train.divergence import Divergence
from lyco_lab.train.fitting import fit
from lyco_lab.train.journal import Journal
from lyco_lab.train.module import Training
from lyco_lab.train.stage import DTYPES, training
from lyco_lab.train.validation import Validation, split
from tests.accelerator.fake import DEVICE, accelerator, there

IMAGES = 4
# One of each shape.
LAYERS = (["*attn1.to_q", "*ff.net.2", "*resnets.0.conv1", "*.proj_in"], ["*0.self_attn.q_proj"])
Meddle = Callable[[Training], None] | None


class Elsewhere(CPUAccelerator):
    """Lightning looks for nothing on it."""

    def setup_device(self, device: torch.device) -> None:
        pass


class Single(SingleDeviceStrategy):
    """Training on one device, of a module that is there and stays there."""

    def model_to_device(self) -> None:
        self.model._device = self.root_device  # what `to` would do beside moving

    def teardown(self) -> None:
        pass  # Lightning would move all weights to the processor, once all is over


class Quiet:
    """In a tracker's place."""

    def log(self, step: int, values: dict[str, float]) -> None:
        assert all(isinstance(value, float) for value in values.values())


def run_of(
    folder: Path, precision: str = "fp32", text_encoder: bool = False, **sections: Any
) -> Run:
    settings = {"steps": 1, "warmup_steps": 0, "batch_size": 2} | sections.pop("train", {})
    return Run(
        name="there",
        study="tests",
        model=Model(path=str(folder), precision=precision, text_encoder=text_encoder),
        data=Data(folder=str(folder)),
        train=Train(**settings),
        wandb=Wandb(mode="disabled"),
        **sections,
    )


@functools.cache
def loaded(path: str, dtype: torch.dtype) -> Diffusion:
    """The tiny model with a denoiser of a single block: each operation costs a millisecond."""
    from diffusers import UNet2DConditionModel

    small = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    found = load(path, dtype)
    return dataclasses.replace(found, unet=small.to(dtype).requires_grad_(False).eval())


def model(run: Run) -> Diffusion:
    """The run's model on the processor, for this call alone."""
    return copy.deepcopy(loaded(run.model.path, DTYPES[run.model.precision]))


def put(diffusion: Diffusion) -> Diffusion:
    """The model on the device, whatever is mounted on it; to be called inside `accelerator`."""
    for part in (*diffusion.parts.values(), diffusion.vae):
        there(part)
    return diffusion


def material(run: Run, diffusion: Diffusion) -> Cache:
    """Pictures as a run keeps them on the processor; their numbers are of no interest."""
    side = diffusion.image_size
    latents = torch.zeros(IMAGES, 4, side // 4, side // 4)
    texts = ["a circle"] * (IMAGES + 1)
    if run.reads_texts:
        text = diffusion.tokenize(texts)
    else:
        width = diffusion.denoiser.config.cross_attention_dim
        text = {"hidden": torch.zeros(len(texts), 32, width, dtype=diffusion.dtype)}
    sizes = Sizes.whole(side, side, IMAGES)
    return Cache(Latents(latents, latents), sizes, text, 0, (1,) * IMAGES)


def trained(
    run: Run,
    folder: Path,
    monkeypatch: Any,
    meddle: Meddle = None,
    layers: Sequence[Sequence[str]] = LAYERS,
) -> Counter:
    """How often all steps of a run wait, by the loop that trains runs, and for which reasons.

    `meddle` is given the module before it trains. metrics.csv is written to `folder`. `layers`:
    patterns of those that are adapted, of the denoiser and of the text encoder.
    """
    diffusion = model(run)
    shown = material(run, diffusion)
    with accelerator(monkeypatch) as waited:
        put(diffusion)
        mounted = {
            part: attach(network, run.adapter_value(), patterns, seed=run.seed, options=run.options)
            for (part, network), patterns in zip(
                diffusion.trained(run.model.text_encoder).items(), layers, strict=False
            )
        }
        assert set(waited) == {"weights"}
        waited.clear()
        module = training(run, diffusion, mounted)
        if meddle is not None:
            meddle(module)
        _fit(run, shown, module, folder, monkeypatch)
    return waited


def _fit(run: Run, shown: Cache, module: Training, folder: Path, monkeypatch: Any) -> None:

    def trainer(**settings: Any) -> lightning.Trainer:
        strategy = Single(torch.device(DEVICE), accelerator=Elsewhere())
        return lightning.Trainer(**settings | {"accelerator": "auto", "strategy": strategy})

    with monkeypatch.context() as patch:
        patch.setattr(Training, "digest", lambda self: b"")  # of numbers, after the last step
        # It would make a tensor of the length, before the first step.
        patch.setattr(fit_loop, "has_len_all_ranks", lambda *_, **__: True)
        patch.setattr(fitting, "lightning", SimpleNamespace(Trainer=trainer))
        with Journal(folder / "metrics.csv", 0) as journal:
            between = [Norms(run.train.steps), Rows(journal, Quiet())]
            if run.train.validate_every is not None:
                order, held = split(shown.order(1, run.seed), run.train.validation_share)
                validation = Validation(shown, order, held, run.train.batch_size)
                between.insert(0, Validating(validation, run.train.validate_every))
            between.append(Watching(Divergence(run.train)))
            fit(run, module, shown, 0, between)
