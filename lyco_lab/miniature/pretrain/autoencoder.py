"""The autoencoder: 64 x 64 x 3 to 16 x 16 x 4 and back.

Its loss weighs colour apart from brightness. A plain L1 loss leaves so small a network colour
blind: the mean over channels dominates, and hue is learnt last.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from lyco_lab.miniature.pretrain import material
from lyco_lab.miniature.pretrain.fit import fit
from lyco_lab.miniature.pretrain.recipe import Recipe
from lyco_lab.seeds import generator

WIDTHS = (16, 32, 64)


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(y: Tensor, x: Tensor, sharpness: float) -> Tensor:
    """Squared error on brightness and colour, moving to L1 and edges as `sharpness` goes 0 to 1."""
    error = y - x
    luma = error.mean(1, keepdim=True)
    chroma = error - luma
    squared = 2 * (luma**2).mean() + 8 * (chroma**2).mean()
    pooled = 8 * (F.avg_pool2d(chroma, 4) ** 2).mean()
    return squared * (1 - 0.7 * sharpness) + _sharp(error, y, x) * sharpness + pooled


def _sharp(error: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """L1 on pixels and on slopes, which squared error would let blur."""
    slopes = zip(_slopes(y), _slopes(x), strict=True)
    return error.abs().mean() + 0.3 * sum((a - b).abs().mean() for a, b in slopes)


def _pictures(
    work: Path, recipe: Recipe, part: str, batch: int
) -> Callable[[int], tuple[Tensor, Generator]]:
    """What a step sees, every fifth time of concepts; and the step's generator, to draw on."""
    base, concepts = material.training(work, recipe), material.concept_training(work, recipe)

    def seen(step: int) -> tuple[Tensor, Generator]:
        g = generator(recipe.seed, part, step)
        pool = concepts if step % 5 == 0 else base
        picked = torch.randint(len(pool), (batch,), generator=g).tolist()
        return material.to_tensor(pool.pixels[picked]), g

    return seen


def train(work: Path, recipe: Recipe) -> AutoencoderKL:
    """Trained on base and concept pictures alike: Stable Diffusion's autoencoder is generic too."""
    seen = _pictures(work, recipe, "autoencoder", recipe.autoencoder_batch)
    torch.manual_seed(recipe.seed)  # the layers' own initialisation has no other source
    vae = build()
    schedule = recipe.autoencoder

    def loss(step: int) -> Tensor:
        x, g = seen(step)
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encode(x).latent_dist
            mean, logvar = moments.mean.float(), moments.logvar.float()
            noise = torch.randn(mean.shape, generator=g)
            y = vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        sharpness = min(1.0, 2 * step / schedule.steps)
        return reconstruction_loss(y, x, sharpness) + 3e-4 * kl

    fit("autoencoder", work, vae, loss, schedule)
    vae.register_to_config(scaling_factor=_scaling_factor(vae, material.validation(work, recipe)))
    return vae


def refine(work: Path, recipe: Recipe, first: AutoencoderKL) -> AutoencoderKL:
    """A copy of `first`, trained on for squared error, its latents held near where they were.

    It goes on beside the denoiser's training, which began on the first latents and ends on these:
    what moves is a tenth of their deviation, in which the finer detail is written.
    """
    seen = _pictures(work, recipe, "refine", recipe.autoencoder_batch)
    vae = copy.deepcopy(first)
    scale = vae.config.scaling_factor

    def loss(step: int) -> Tensor:
        x, g = seen(step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                before = first.encode(x).latent_dist
            now = vae.encode(x).latent_dist
            # The denoiser's latents are never quite right: a little noise stands for that.
            noise = 0.02 * torch.randn(now.mean.shape, generator=g)
            y = vae.decode(now.mean + noise).sample.float()
        error = y - x
        moved = (scale * (now.mean.float() - before.mean.float())) ** 2
        spread = (now.logvar.float() - before.logvar.float()) ** 2
        anchor = 0.5 * moved.mean() + 0.01 * spread.mean()
        return 5 * (error**2).mean() + 0.1 * _sharp(error, y, x) + anchor

    fit("refine", work, vae, loss, recipe.refine)
    return vae


def polish(work: Path, recipe: Recipe, refined: AutoencoderKL) -> AutoencoderKL:
    """A copy of `refined` whose decoder was trained on: no latent moves, so nothing else has to."""
    seen = _pictures(work, recipe, "polish", recipe.polish_batch)
    vae = copy.deepcopy(refined)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def loss(step: int) -> Tensor:
        x, g = seen(step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                mean = vae.encode(x).latent_dist.mean
            y = vae.decode(mean + 0.02 * torch.randn(mean.shape, generator=g)).sample.float()
        error = y - x
        return 5 * (error**2).mean() + 0.05 * _sharp(error, y, x)

    fit("polish", work, decoder, loss, recipe.polish)
    return vae


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKL, pictures: material.Pictures) -> float:
    """1 / the latents' standard deviation, so that the denoiser sees unit variance."""
    x = material.to_tensor(pictures.pixels[:256])
    return float(1 / vae.encode(x).latent_dist.mean.std())
