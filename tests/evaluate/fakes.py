"""Judges that read images by arithmetic: the interface of the real ones, in microseconds.

The oracle reads "hue" (which channel is strongest) and "light" (dark or bright), and takes an
image for the concept "vokael" when its first pixel is white.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from lyco_lab.evaluate.base import Images, unit

HUES = ["red", "green", "blue"]
LIGHTS = ["dark", "bright"]
CONCEPTS = ["none", "vokael"]


def pixels(images: Images) -> Tensor:
    return torch.from_numpy(images.astype(np.float64) / 255.0)


class FakeJudges:
    vocabulary = {"hue": HUES, "light": LIGHTS, "concept": CONCEPTS}

    def image_features(self, images: Images) -> Tensor:
        return unit(pixels(images)[:, ::4, ::4].flatten(1) - 0.4)

    def clip_image(self, images: Images) -> Tensor:
        return unit(pixels(images).mean(dim=(1, 2)) - 0.3)

    def clip_text(self, texts: list[str]) -> Tensor:
        digests = [hashlib.blake2b(text.encode(), digest_size=3).digest() for text in texts]
        return unit(torch.tensor([[byte / 255.0 - 0.4 for byte in d] for d in digests]))

    def gram_features(self, images: Images) -> list[Tensor]:
        x = pixels(images).permute(0, 3, 1, 2)
        return [x, x[:, :, ::2, ::2] - x[:, :, 1::2, 1::2]]

    def attributes(self, images: Images) -> dict[str, Tensor]:
        x = pixels(images)
        bright = x.mean(dim=(1, 2, 3))
        concept = x[:, 0, 0].min(dim=1).values
        return {
            "hue": torch.softmax(9.0 * x.mean(dim=(1, 2)), dim=1),
            "light": torch.stack([1.0 - bright, bright], dim=1),
            "concept": torch.stack([1.0 - concept, concept], dim=1),
        }


def noise_images(n: int, seed: int, size: int = 16) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
