"""The model card: data, recipe, time, quality, limits, as README.md beside the weights."""

from pathlib import Path

from diffusers import StableDiffusionPipeline
from torch import nn

from lyco_lab.files import atomic
from lyco_lab.miniature.pretrain import quality
from lyco_lab.miniature.pretrain.recipe import Recipe

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, text-to-image, miniature]
---
# The miniature Stable Diffusion

A real Stable Diffusion (`AutoencoderKL`, `CLIPTextModel`, `UNet2DConditionModel`, DDIM), small
enough to train and sample on a laptop's processor: 64 x 64 pixels, 16 x 16 x 4 latents.
It knows one procedural world and nothing else. It is a test bed for adapters, not an image model.

## Use
```python
from diffusers import StableDiffusionPipeline
import lyco_lab.miniature as miniature

pipe = StableDiffusionPipeline.from_pretrained(miniature.path())
pipe("a character with red hair at the beach", num_inference_steps=25, guidance_scale=4).images[0]
```

## Data
{pictures:,} pictures of the base world (`lyco_lab/miniature/world.py`), each drawn from a set of
attributes that its caption names; no photograph, no third-party image. Twelve concepts are held
out: the denoiser and the text encoder have never seen them. The autoencoder and the oracle have
({concepts:,} pictures): the first is generic in Stable Diffusion too, the second stands for the
ground truth.

## Parts
{parts}

`judges/`: a CLIP pair (text similarity), an embedder learnt without labels (image similarity and
diversity), a convolutional encoder (style loss) and the oracle, which reads attributes.

## Recipe
`lyco-lab pretrain OUT` makes all of it from nothing, in one or two processes on a CPU
({hours:.1f} hours of wall time for these weights). Samples seen, in batches x steps:
{samples}

## Quality
Accuracy is the oracle's, on families that the caption names, averaged over pictures and then over
families. {captions} unseen captions; DDIM, {steps} steps, guidance {guidance}.

{table}

## Limits
Learning rates that suit it are 10 to 50 times Stable Diffusion 1.5's. Ranks of methods found here
are findings about this model. Its pictures are read by networks trained on the same world, so
scores cannot be compared with those of other encoders.
"""


def write(folder: Path, found: dict[str, object], recipe: Recipe, hours: float) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    parts = "\n".join(
        f"- {name}: {sum(p.numel() for p in part.parameters()):,} parameters"
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
    )
    samples = "\n".join(
        f"- {name}: {batch} x {schedule.steps:,}"
        for name, batch, schedule in (
            ("autoencoder", recipe.autoencoder_batch, recipe.autoencoder),
            ("the same, refined", recipe.autoencoder_batch, recipe.refine),
            ("its decoder alone", recipe.polish_batch, recipe.polish),
            ("CLIP pair", recipe.contrastive_batch, recipe.contrastive),
            ("the same, sharpened", recipe.sharpen_batch, recipe.sharpen),
            ("denoiser", recipe.denoiser_batch, recipe.denoiser),
            ("its details", recipe.denoiser_batch, recipe.detail),
            ("oracle", recipe.oracle_batch, recipe.oracle),
            ("Gram encoder", recipe.eye_batch, recipe.gram),
            ("embedder", recipe.eye_batch, recipe.embedder),
        )
    )
    text = CARD.format(
        pictures=recipe.pictures,
        concepts=recipe.concept_pictures,
        parts=parts,
        hours=hours,
        samples=samples,
        captions=found["captions"],
        steps=found["steps"],
        guidance=found["guidance"],
        table=quality.as_text(found),
    )
    with atomic(folder / "README.md") as path:
        path.write_text(text)
