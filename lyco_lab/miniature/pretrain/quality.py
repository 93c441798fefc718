"""How good the miniature is: figures that can be computed again from the weights alone.

oracle           attribute accuracy on fresh real pictures: what can be read off at all
autoencoder      PSNR, and the oracle's accuracy on reconstructions
denoiser         the oracle's accuracy on pictures made from unseen captions
text similarity  how often the right caption comes first among 100
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

from lyco_lab.miniature.judges import Images, Judges
from lyco_lab.miniature.pretrain.material import to_pixels, to_tensor
from lyco_lab.miniature.vocabulary import Scene, caption, sample
from lyco_lab.miniature.world import render

FRESH = "quality"  # the stream of scenes that nothing was trained on
STEPS, GUIDANCE = 25, 4.0


def fresh_scenes(count: int) -> list[Scene]:
    return [sample(random.Random(f"{FRESH}:{i}")) for i in range(count)]


def fresh_pictures(scenes: Sequence[Scene]) -> Images:
    return np.stack([render(s, random.Random(f"{FRESH}:drawn:{i}")) for i, s in enumerate(scenes)])


def accuracy(judges: Judges, pictures: Images, scenes: Sequence[Scene]) -> dict[str, float]:
    """family -> share of pictures whose most probable value is the scene's, where readable."""
    hits: dict[str, list[bool]] = {}
    read = {
        family: probabilities.argmax(1).tolist()
        for family, probabilities in _batched(judges, pictures).items()
    }
    for i, scene in enumerate(scenes):
        for family, value in scene.readable().items():
            found = judges.vocabulary[family][read[family][i]]
            hits.setdefault(family, []).append(found == value)
    return {family: float(np.mean(values)) for family, values in sorted(hits.items())}


def _batched(judges: Judges, pictures: Images) -> dict[str, torch.Tensor]:
    parts = [judges.attributes(pictures[i : i + 128]) for i in range(0, len(pictures), 128)]
    return {family: torch.cat([p[family] for p in parts]) for family in parts[0]}


@torch.no_grad()
def reconstruct(pipe: StableDiffusionPipeline, pictures: Images) -> Images:
    found = []
    for i in range(0, len(pictures), 64):
        z = pipe.vae.encode(to_tensor(pictures[i : i + 64])).latent_dist.mean
        found.append(to_pixels(pipe.vae.decode(z).sample))
    return np.concatenate(found)


def psnr(pictures: Images, reconstructed: Images) -> float:
    """Mean over pictures of 10 log10(255^2 / mean squared error), in dB."""
    error = (pictures.astype(np.float64) - reconstructed) ** 2
    return float((10 * np.log10(255**2 / error.mean((1, 2, 3)))).mean())


def draw(
    pipe: StableDiffusionPipeline,
    captions: Sequence[str],
    guidance: float = GUIDANCE,
    steps: int = STEPS,
) -> Images:
    """One picture per caption; picture i starts from noise of seed i."""
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.set_attn_processor(AttnProcessor())
    found = []
    for start in range(0, len(captions), 50):
        batch = list(captions[start : start + 50])
        seeds = [torch.Generator().manual_seed(start + k) for k in range(len(batch))]
        images = pipe(
            batch, num_inference_steps=steps, guidance_scale=guidance, generator=seeds,
            output_type="np",
        ).images  # fmt: skip
        found.append((images * 255).round().astype(np.uint8))
    return np.concatenate(found)


def ranked_first(judges: Judges, pictures: Images, captions: Sequence[str]) -> float | None:
    """Share of pictures whose own caption is the most similar of its hundred; None for fewer."""
    hits = []
    for start in range(0, len(captions) - 99, 100):
        here = slice(start, start + 100)
        similarity = judges.clip_image(pictures[here]) @ judges.clip_text(list(captions[here])).T
        hits += (similarity.argmax(1) == torch.arange(100)).tolist()
    return float(np.mean(hits)) if hits else None


def table(pipe: StableDiffusionPipeline, judges: Judges, count: int) -> dict[str, object]:
    """All figures, on `count` unseen captions and max(count, 500) fresh real pictures."""
    scenes = fresh_scenes(max(count, 500) if count >= 100 else count)
    real = fresh_pictures(scenes)
    rebuilt = reconstruct(pipe, real)
    captions = [caption(s) for s in scenes]
    drawn = draw(pipe, captions[:count])
    rows = {
        "real": accuracy(judges, real, scenes),
        "reconstructed": accuracy(judges, rebuilt, scenes),
        "generated": accuracy(judges, drawn, scenes[:count]),
    }
    return {
        "accuracy": rows,
        "mean": {name: float(np.mean(list(row.values()))) for name, row in rows.items()},
        "psnr_db": psnr(real, rebuilt),
        "caption_first_of_100": ranked_first(judges, real, captions),
        "captions": count,
        "steps": STEPS,
        "guidance": GUIDANCE,
    }


def write(folder: Path, found: dict[str, object]) -> None:
    (folder / "quality.json").write_text(json.dumps(found, indent=2) + "\n")


def as_text(found: dict[str, object]) -> str:
    """The table as Markdown: families down, real / reconstructed / generated across."""
    rows: dict[str, dict[str, float]] = found["accuracy"]  # type: ignore[assignment]
    means: dict[str, float] = found["mean"]  # type: ignore[assignment]
    lines = ["| family | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for family in rows["real"]:
        cells = (f"{row.get(family, float('nan')):.3f}" for row in rows.values())
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    lines.append("| **mean** | " + " | ".join(f"**{means[name]:.3f}**" for name in rows) + " |")
    lines.append("")
    lines.append(f"Reconstructions: {found['psnr_db']:.1f} dB.")
    if (first := found["caption_first_of_100"]) is not None:
        lines[-1] += f" Right caption first of 100: {first:.3f}."
    return "\n".join(lines)
