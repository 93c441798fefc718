"""Training the networks that judge: oracle, Gram encoder, embedder.

The oracle also sees the held-out concepts: it stands for the ground truth, not for the model.
The other two see the pretraining world alone, as VGG19 and DINOv2 never saw the user's concept.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lyco_lab.miniature.networks import Embedder, Gram, Oracle
from lyco_lab.miniature.pretrain import material
from lyco_lab.miniature.pretrain.fit import Loss, fit
from lyco_lab.miniature.pretrain.labels import attribute_loss, labels
from lyco_lab.miniature.pretrain.recipe import Recipe
from lyco_lab.seeds import generator


def roughen(x: Tensor, g: Generator) -> Tensor:
    """Noise, and now and then blur: what generated pictures suffer from."""
    x = x + torch.randn(x.shape, generator=g) * 0.15 * torch.rand(len(x), 1, 1, 1, generator=g)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand(len(x), 1, 1, 1, generator=g) * (torch.rand(1, generator=g) < 0.5)
    return x + amount * (blurred - x)


def train_oracle(work: Path, recipe: Recipe) -> Oracle:
    base, concepts = material.training(work, recipe), material.concept_training(work, recipe)
    known, known_concepts = labels(base.scenes), labels(concepts.scenes)
    torch.manual_seed(recipe.seed + 2)
    oracle = Oracle()
    share = recipe.oracle_batch // 4  # of concepts

    def loss(step: int) -> Tensor:
        g = generator(recipe.seed, "oracle", step)
        ours = torch.randint(len(base), (recipe.oracle_batch - share,), generator=g)
        theirs = torch.randint(len(concepts), (share,), generator=g)
        x = torch.cat(
            [
                material.to_tensor(base.pixels[ours.tolist()]),
                material.to_tensor(concepts.pixels[theirs.tolist()]),
            ]
        )
        with torch.autocast("cpu", torch.bfloat16):
            guesses = oracle(roughen(x, g))
        n = len(ours)
        return attribute_loss({f: v[:n] for f, v in guesses.items()}, known, ours) + attribute_loss(
            {f: v[n:] for f, v in guesses.items()}, known_concepts, theirs
        )

    fit("oracle", work, oracle, loss, recipe.oracle, save_every=100)
    return oracle


def train_gram(work: Path, recipe: Recipe) -> Gram:
    base = material.training(work, recipe)
    known = labels(base.scenes)
    torch.manual_seed(recipe.seed + 3)
    gram = Gram()

    def loss(step: int) -> Tensor:
        g = generator(recipe.seed, "gram", step)
        picked = torch.randint(len(base), (recipe.eye_batch,), generator=g)
        x = material.to_tensor(base.pixels[picked.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            guesses = gram(x)
        return attribute_loss(guesses, known, picked)

    fit("gram", work, gram, loss, recipe.gram, save_every=100)
    return gram


def train_embedder(work: Path, recipe: Recipe) -> Embedder:
    """Two views of a picture should agree, and differ from all others' (SimCLR's NT-Xent)."""
    base = material.training(work, recipe)
    torch.manual_seed(recipe.seed + 4)
    embedder = Embedder()

    fit(
        "embedder",
        work,
        embedder,
        _contrast(embedder, base, recipe),
        recipe.embedder,
        save_every=100,
    )
    return embedder


def _contrast(embedder: Embedder, base: material.Pictures, recipe: Recipe) -> Loss:
    n, temperature = recipe.eye_batch, 0.2

    def loss(step: int) -> Tensor:
        g = generator(recipe.seed, "embedder", step)
        picked = torch.randint(len(base), (n,), generator=g).tolist()
        x = material.to_tensor(base.pixels[picked])
        views = torch.cat([_view(x, g), _view(x, g)])
        with torch.autocast("cpu", torch.bfloat16):
            z = embedder(views)
        z = z.float()
        logits = (z @ z.T / temperature).fill_diagonal_(-1e9)
        return F.cross_entropy(logits, (torch.arange(2 * n) + n) % (2 * n))

    return loss


def _view(x: Tensor, g: Generator) -> Tensor:
    """A crop of 70 to 100 %, perhaps mirrored, with other brightness, contrast and noise."""
    n = len(x)
    size = 0.7 + 0.3 * torch.rand(n, 1, generator=g)
    shift = (torch.rand(n, 2, generator=g) * 2 - 1) * (1 - size)
    mirror = torch.where(torch.rand(n, 1, generator=g) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(size)
    affine = torch.stack(
        [
            torch.cat([size * mirror, zero, shift[:, :1]], 1),
            torch.cat([zero, size, shift[:, 1:]], 1),
        ],
        1,
    )
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    y = F.grid_sample(x, grid, align_corners=False, padding_mode="reflection")
    gain = 0.75 + 0.5 * torch.rand(n, 1, 1, 1, generator=g)
    lift = 0.3 * (torch.rand(n, 1, 1, 1, generator=g) - 0.5)
    return roughen(y * gain + lift, g)
