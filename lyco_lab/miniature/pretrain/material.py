"""What pretraining looks at: pictures drawn once and kept on disk beside the checkpoints."""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lyco_lab.files import atomic
from lyco_lab.miniature.concepts import CONCEPTS
from lyco_lab.miniature.judges import to_input
from lyco_lab.miniature.pretrain.recipe import Recipe
from lyco_lab.miniature.styles import Pixels
from lyco_lab.miniature.vocabulary import BASE, Scene, sample
from lyco_lab.miniature.world import Pictures, render

# Apart from each other: no picture that a model is judged on was drawn for training.
TRAINING, VALIDATION, CONCEPT = 1, 2, 3


def base_scene(seed: int, part: int, i: int) -> tuple[Scene, random.Random]:
    rng = random.Random(f"pretrain:{seed}:{part}:{i}")
    return sample(rng), rng


def concept_scene(seed: int, part: int, i: int) -> tuple[Scene, random.Random]:
    """A held-out concept in any place and style: the judges have to know it everywhere."""
    rng = random.Random(f"pretrain:{seed}:{part}:{i}")
    subject = list(CONCEPTS.values())[i % len(CONCEPTS)]
    style = "flat" if rng.random() < 0.4 else rng.choice(BASE["style"])
    return subject.scene(rng, style=style), rng


def pictures(work: Path, seed: int, part: int, count: int) -> Pictures:
    """The first `count` pictures of a part, from `work/pictures-PART.npy` where it is there."""
    draw = concept_scene if part == CONCEPT else base_scene
    path = work / f"pictures-{part}-{count}.npy"
    if not path.exists():
        drawn = np.empty((count, 64, 64, 3), np.uint8)
        for i in range(count):
            drawn[i] = render(*draw(seed, part, i))
        with atomic(path) as temporary:
            np.save(temporary, drawn)
    scenes = tuple(draw(seed, part, i)[0] for i in range(count))
    return Pictures(scenes, np.load(path, mmap_mode="r"))


def training(work: Path, recipe: Recipe) -> Pictures:
    return pictures(work, recipe.seed, TRAINING, recipe.pictures)


def validation(work: Path, recipe: Recipe) -> Pictures:
    return pictures(work, recipe.seed, VALIDATION, recipe.validation)


def concept_training(work: Path, recipe: Recipe) -> Pictures:
    return pictures(work, recipe.seed, CONCEPT, recipe.concept_pictures)


def to_tensor(pixels: Pixels) -> Tensor:
    """What the judges see, of pictures that may be a read-only part of a file."""
    return to_input(np.array(pixels))


def to_pixels(images: Tensor) -> Pixels:
    """(N, 3, H, W) float in [-1, 1] to (N, H, W, 3) uint8."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    pixels: Pixels = levels.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
    return pixels
