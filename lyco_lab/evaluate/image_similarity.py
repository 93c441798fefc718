"""Image similarity: how much the generated images look like the training images.

    S = mean over all pairs (i, j) of cos(g_i, d_j)

g_i are the image encoder's features of the generated images, d_j those of the dataset. Range
[-1, 1], higher is better for fidelity: copying the dataset scores high too, so it is read beside
diversity and text similarity. The training images among themselves (pairs i != j) say how high a
faithful and varied model can be expected to go.

Shapes: N generated images, M dataset images, D features.

Reference:
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), appendix D.4, https://arxiv.org/abs/2309.14859
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lyco_lab.evaluate.base import Metric, Score, View, per_image, unit


def image_similarity(g_ND: Tensor, d_MD: Tensor) -> Tensor:
    """(N,): for each generated image, the mean cosine with all dataset images.

    The mean of cosines with unit vectors is the dot product with their mean, so no N x M matrix.
    """
    return (unit(g_ND) @ unit(d_MD).mean(dim=0)).clamp(-1.0, 1.0)


def image_similarity_within(d_MD: Tensor) -> Tensor:
    """(M,): for each image, the mean cosine with the other images of its set; NaN if M = 1."""
    d_MD = unit(d_MD)
    others = len(d_MD) - 1
    if others == 0:
        return torch.full((1,), torch.nan, dtype=torch.float64)
    own_M = (d_MD * d_MD).sum(dim=1)
    return ((d_MD @ d_MD.sum(dim=0) - own_M) / others).clamp(-1.0, 1.0)


class ImageSimilarity(Metric):
    name: ClassVar[str] = "image_similarity"
    title: ClassVar[str] = "Image similarity"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    low: ClassVar[float] = -1.0
    high: ClassVar[float] = 1.0
    columns: ClassVar[dict[str, str]] = {
        "image_similarity_train": "train",
        "image_similarity_alter": "alter",
    }

    def measure(self, view: View) -> dict[str, Score]:
        if view.is_real:
            values_N = image_similarity_within(view.real.features_ND)
        else:
            values_N = image_similarity(view.images.features_ND, view.real.features_ND)
        return {self.name: per_image(values_N, view)}
