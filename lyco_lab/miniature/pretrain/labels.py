"""Attributes as class indices, for the heads that learn to read them."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lyco_lab.miniature.networks import VOCABULARY
from lyco_lab.miniature.vocabulary import Scene

UNKNOWN = -100  # the index that cross_entropy ignores


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """family -> (N,) class indices; UNKNOWN where the scene lacks it or its style hides it."""
    found = {family: torch.full((len(scenes),), UNKNOWN) for family in VOCABULARY}
    for i, scene in enumerate(scenes):
        for family, value in {**scene.readable(), "concept": scene.concept}.items():
            found[family][i] = VOCABULARY[family].index(value)
    return found


def attribute_loss(
    guesses: Mapping[str, Tensor], known: Mapping[str, Tensor], picked: Tensor
) -> Tensor:
    """Sum over families of the cross entropy, leaving out what is unknown."""
    total = torch.zeros(())
    for family, logits in guesses.items():
        truth = known[family][picked]
        if (truth != UNKNOWN).any():
            total = total + F.cross_entropy(logits.float(), truth)
    return total
