"""The three small networks that judge pictures, beside the CLIP pair.

    Oracle    reads attributes off a picture; the ground truth of the world stands behind it
    Gram      VGG19's part: five convolution stages, whose features go into Gram matrices
    Embedder  DINOv2's part: an embedding learnt without labels

All take (N, 3, 64, 64) floats in [-1, 1].
"""

import torch
from torch import Tensor, nn

from lyco_lab.miniature.concepts import CONCEPTS
from lyco_lab.miniature.vocabulary import FAMILIES

VOCABULARY: dict[str, tuple[str, ...]] = {**FAMILIES, "concept": ("none", *CONCEPTS)}


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def _trunk(width: int) -> nn.Sequential:
    """64 x 64 to 4 x 4 in four halvings, `4 * width` channels at the end."""
    widths = [3, width, 2 * width, 3 * width, 4 * width]
    stages = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*(layer for i, o in stages for layer in _stage(i, o)))


class Oracle(nn.Module):
    """One head per family of attributes, over the values of `VOCABULARY`."""

    def __init__(self, width: int = 32, features: int = 160) -> None:
        super().__init__()
        self.trunk = _trunk(width)
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(64 * width, features), nn.ReLU())
        self.heads = nn.ModuleDict({f: nn.Linear(features, len(v)) for f, v in VOCABULARY.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.project(self.trunk(x))
        return {family: head(features) for family, head in self.heads.items()}


class Gram(nn.Module):
    """Five stages, each ending in the convolution whose output (before its ReLU) is returned.

    As with VGG19's conv1_1 ... conv5_1, the first sees the full resolution.
    """

    WIDTHS = (16, 32, 48, 64, 64)

    def __init__(self) -> None:
        super().__init__()
        ends = (3, *self.WIDTHS)
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip(ends, self.WIDTHS, strict=False)
        )
        self.mixers = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for w in self.WIDTHS)
        families = [f for f in FAMILIES if f != "position"]
        self.heads = nn.ModuleDict({f: nn.Linear(64, len(FAMILIES[f])) for f in families})

    def _run(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        found = []
        for i, (stage, mixer) in enumerate(zip(self.stages, self.mixers, strict=True)):
            x = stage(x)
            found.append(x)
            x = torch.relu(mixer(torch.relu(x)))
            if i < len(self.stages) - 1:
                x = nn.functional.max_pool2d(x, 2)
        return found, x

    def features(self, x: Tensor) -> list[Tensor]:
        return self._run(x)[0]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Attribute logits: what it is pretrained on, as VGG19 is on ImageNet's classes."""
        pooled = self._run(x)[1].mean((2, 3))
        return {family: head(pooled) for family, head in self.heads.items()}


class Embedder(nn.Module):
    """`EMBEDDING` numbers for a picture, and a projection that only its training uses."""

    EMBEDDING = 96

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.trunk = _trunk(width)
        self.embed = nn.Linear(4 * width * 4, self.EMBEDDING)
        self.project = nn.Sequential(nn.ReLU(), nn.Linear(self.EMBEDDING, 64))

    def embedding(self, x: Tensor) -> Tensor:
        return self.embed(nn.functional.adaptive_avg_pool2d(self.trunk(x), 2).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.project(self.embedding(x)), dim=1)
