"""Style loss against the base model: how far fine-tuning moved images it had no reason to move.

    L = mean over pairs (x, x') of  sum over layers l of || G_l(x) - G_l(x') ||_F^2
    G_l = psi_l psi_l^T / (c_l h_l w_l)

psi_l (c_l x h_l w_l) are a convolutional encoder's features at layer l; x is the fine-tuned model's
image and x' the base model's for the same prompt and seed. Range [0, inf), lower means the base
model is better preserved; the base model scores 0 by definition. The paper quotes it on prompts
that name a style, where forgetting shows first.

Shapes: N pairs, C channels; one Gram matrix (N, C, C) per layer.

References:
    Image Style Transfer Using Convolutional Neural Networks (Gatys et al., 2016)
    Yeh et al., 2024, appendix D.4, https://arxiv.org/abs/2309.14859
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lyco_lab.evaluate.base import Metric, Score, View, per_image


def style_loss(grams: Sequence[Tensor], grams_base: Sequence[Tensor]) -> Tensor:
    """(N,): the summed squared distance of each pair's Gram matrices."""
    layers = zip(grams, grams_base, strict=True)
    return torch.stack([(g_NCC - b_NCC).square().sum(dim=(1, 2)) for g_NCC, b_NCC in layers]).sum(0)


class StyleLoss(Metric):
    name: ClassVar[str] = "style_loss"
    title: ClassVar[str] = "Style loss"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = float("inf")
    columns: ClassVar[dict[str, str]] = {"style_loss": "style"}

    def measure(self, view: View) -> dict[str, Score]:
        if view.base is None:  # the training images have no partner
            return {}
        return {self.name: per_image(style_loss(view.images.grams, view.base.grams), view)}
