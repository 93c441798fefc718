"""Vendi score: the effective number of different images in a set.

    V = exp(-sum_k lambda_k log lambda_k)
    lambda = eigenvalues of K / n,  K_ij = cos(x_i, x_j)

The exponential of an entropy: n identical images give 1, n orthogonal ones n, and c equal clusters
give c. Range [1, n], higher is more diverse. It grows with n, so only sets of one size compare.
For prompt types whose prompts differ (train, alter, style) the paper scores

    train, trigger   the set of all images
    alter, style     each prompt's images, then the mean over prompts

since content that the prompt fixes is no diversity of the model's.

Shapes: N images, D features.

References:
    The Vendi Score: A Diversity Evaluation Metric for Machine Learning (Friedman & Dieng, 2023),
    https://arxiv.org/abs/2210.02410
    Yeh et al., 2024, appendix D.4, https://arxiv.org/abs/2309.14859
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lyco_lab.evaluate.base import Metric, Score, View, unit

BY_PROMPT = ("alter", "style")


def vendi(x_ND: Tensor) -> float:
    """The score of one set, in float64: the entropy loses digits near 0 and near log n."""
    x_ND = unit(x_ND)
    n, d = x_ND.shape
    # X X^T and X^T X share their non-zero eigenvalues, and zeros add nothing to the entropy.
    k = (x_ND @ x_ND.T if n <= d else x_ND.T @ x_ND) / n
    lambdas = torch.linalg.eigvalsh(k).clamp_min(0.0)
    score = torch.exp(-torch.special.xlogy(lambdas, lambdas).sum())
    return float(score.clamp(1.0, float(n)))


class Vendi(Metric):
    name: ClassVar[str] = "vendi"
    title: ClassVar[str] = "Vendi score"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    low: ClassVar[float] = 1.0
    high: ClassVar[float] = float("inf")
    columns: ClassVar[dict[str, str]] = {"vendi_trigger": "trigger"}

    def measure(self, view: View) -> dict[str, Score]:
        x_ND = view.images.features_ND
        if view.kind not in BY_PROMPT:
            return {self.name: Score((vendi(x_ND),), ("",), "set")}
        rows: dict[str, list[int]] = {}
        for i, prompt in enumerate(view.prompts):
            rows.setdefault(prompt, []).append(i)
        values = tuple(vendi(x_ND[index]) for index in rows.values())
        return {self.name: Score(values, tuple(rows), "prompt")}
