"""What a metric is: a number about a set of images, and the claims that tables quote about it.

A metric looks at a `View`: the images that one model made for one prompt type, beside the training
images and the base model's images of the same prompts and seeds. It answers with scores, each a
list of values with the unit they are counted in, so that the mean, its standard error and the
per-image table are three readings of one thing. Encoders run once per set of images, whichever
metrics ask (`Encoded`).

Shapes: N images looked at, M training images, D features.
"""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from lyco_lab import waits

Images = np.ndarray  # uint8, (N, H, W, 3)
BATCH_IMAGES = 64


class Judges(Protocol):
    """The encoders that metrics read images with; lyco_lab.miniature.judges has one such set."""

    @property
    def vocabulary(self) -> Mapping[str, Sequence[str]]: ...

    def clip_image(self, images: Images) -> Tensor: ...

    def clip_text(self, texts: list[str]) -> Tensor: ...

    def image_features(self, images: Images) -> Tensor: ...

    def gram_features(self, images: Images) -> list[Tensor]: ...

    def attributes(self, images: Images) -> dict[str, Tensor]: ...


def unit(x_ND: Tensor) -> Tensor:
    """Rows scaled to length one, in float64; a zero row stays zero."""
    x_ND = torch.as_tensor(x_ND).double()
    return x_ND / x_ND.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def gram(psi_NCHW: Tensor) -> Tensor:
    """G = psi psi^T / (c h w) per image, (N, C, C): which channels fire together, not where."""
    psi_NCP = torch.as_tensor(psi_NCHW).double().flatten(2)
    return psi_NCP @ psi_NCP.mT / (psi_NCP.shape[1] * psi_NCP.shape[2])


class Encoded:
    """A set of images and what the encoders say about it, each computed once and on demand."""

    def __init__(self, images: Images, judges: Judges) -> None:
        if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
            raise ValueError(
                f"images must be uint8 of shape (N, H, W, 3) with N >= 1, "
                f"got {images.dtype} of shape {images.shape}"
            )
        self.images, self.judges = images, judges

    def __len__(self) -> int:
        return len(self.images)

    def _batched(self, encode: Callable[[Images], Tensor]) -> Tensor:
        starts = range(0, len(self.images), BATCH_IMAGES)
        with torch.no_grad():
            parts = [torch.as_tensor(encode(self.images[i : i + BATCH_IMAGES])) for i in starts]
        return waits.host(torch.cat(parts).double(), "features")

    @cached_property
    def features_ND(self) -> Tensor:
        """Unit rows of the image encoder that has DINOv2's role: similarity and diversity."""
        return unit(self._batched(self.judges.image_features))

    @cached_property
    def clip_ND(self) -> Tensor:
        """Unit rows in the space that images share with texts."""
        return unit(self._batched(self.judges.clip_image))

    @cached_property
    def grams(self) -> list[Tensor]:
        """One (N, C, C) Gram matrix per layer; the feature maps themselves are not kept."""
        layers: list[list[Tensor]] = []
        with torch.no_grad():
            for start in range(0, len(self.images), BATCH_IMAGES):
                maps = self.judges.gram_features(self.images[start : start + BATCH_IMAGES])
                layers.append([waits.host(gram(psi_NCHW), "features") for psi_NCHW in maps])
        return [torch.cat(parts) for parts in zip(*layers, strict=True)]

    @cached_property
    def readings(self) -> dict[str, list[str]]:
        """For every family of attributes, the value the oracle finds most probable per image."""
        indices: dict[str, list[int]] = {family: [] for family in self.judges.vocabulary}
        with torch.no_grad():
            for start in range(0, len(self.images), BATCH_IMAGES):
                found = self.judges.attributes(self.images[start : start + BATCH_IMAGES])
                for family, p_NV in found.items():
                    most_N = torch.as_tensor(p_NV).argmax(dim=-1)
                    indices[family] += waits.host(most_N, "features").tolist()
        words = self.judges.vocabulary
        return {family: [words[family][i] for i in found] for family, found in indices.items()}


@dataclass(frozen=True)
class View:
    """One prompt type of one model, beside what it is compared with."""

    kind: str  # train, trigger, alter, style, or "real" for the training images themselves
    images: Encoded
    real: Encoded  # the training images; the same object as `images` when kind is "real"
    base: Encoded | None  # the base model's images of the same prompts and seeds
    texts: Sequence[str]  # per image, the text it is scored against
    prompts: Sequence[str]  # per image, the prompt it was made from
    attributes: Sequence[dict[str, str]]  # per image, what its prompt asks for, by family
    concepts: Sequence[str]  # per image, the oracle's name of the concept; "" where it knows none

    def __post_init__(self) -> None:
        for name in ("texts", "prompts", "attributes", "concepts"):
            if len(getattr(self, name)) != len(self.images):
                raise ValueError(
                    f"a view of {len(self.images)} images needs as many {name}, "
                    f"got {len(getattr(self, name))}"
                )
        if self.base is not None and len(self.base) != len(self.images):
            raise ValueError(
                f"{len(self.images)} images cannot be paired with {len(self.base)} "
                "of the base model"
            )

    @property
    def is_real(self) -> bool:
        return self.images is self.real


@dataclass(frozen=True)
class Score:
    """Values of one quantity. NaN says "does not apply here" and is left out of every mean."""

    values: tuple[float, ...]
    groups: tuple[str, ...]  # the prompt that each value belongs to, or the class it is of
    unit: Literal["image", "prompt", "set", "concept", "class"]

    @property
    def n(self) -> int:
        return int(np.isfinite(self.values).sum())

    @property
    def mean(self) -> float:
        return float(np.nanmean(self.values)) if self.n else float("nan")

    @property
    def standard_error(self) -> float:
        """Of the mean, over prompts: std of the prompts' means / sqrt(number of prompts).

        Images of one prompt are not independent draws of "a prompt", so they are averaged first.
        Where all images share one prompt (the trigger type) the images are the draws. NaN where
        fewer than two draws exist, as for a number about the whole set.
        """
        by_prompt: dict[str, list[float]] = {}
        for value, group in zip(self.values, self.groups, strict=True):
            if np.isfinite(value):
                by_prompt.setdefault(group, []).append(value)
        draws = [float(np.mean(values)) for values in by_prompt.values()]
        if len(draws) == 1:
            draws = next(iter(by_prompt.values()))
        if len(draws) < 2:
            return float("nan")
        return float(np.std(draws, ddof=1) / np.sqrt(len(draws)))


def per_image(values: Iterable[float] | Tensor, view: View) -> Score:
    return Score(tuple(float(v) for v in values), tuple(view.prompts), "image")


class Metric(abc.ABC):
    """A quantity with a name, a direction and a range; `measure` computes it on a view."""

    name: ClassVar[str]
    title: ClassVar[str]  # as a table's head says it
    better: ClassVar[Literal["higher", "lower"]]
    low: ClassVar[float]  # claim: every value lies in [low, high]
    high: ClassVar[float]
    columns: ClassVar[dict[str, str]]  # column of a study's table -> prompt type it is quoted on

    @abc.abstractmethod
    def measure(self, view: View) -> dict[str, Score]:
        """Scores by name: `name` itself, and `name/part` for its parts; empty if inapplicable."""
