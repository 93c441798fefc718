"""A study whose models are drawn by the world's own painter: every stage after training, for real.

A `Painter` has the interface of a loaded Stable Diffusion. How often it draws the concept rather
than something like it, and how often it obeys a prompt, are its two skills, which "merging" a fake
adapter sets. The judge knows what was painted, since each picture is remembered with its truth.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lyco_lab import generate as generate_module
from lyco_lab.config import Data, Generate, Run, Study, Train, Wandb
from lyco_lab.data.stage import dataset, prepare
from lyco_lab.evaluate import stage as evaluate_module
from lyco_lab.evaluate.base import Images, unit
from lyco_lab.files import atomic
from lyco_lab.generate import ask
from lyco_lab.miniature.concepts import concept
from lyco_lab.miniature.networks import VOCABULARY
from lyco_lab.miniature.vocabulary import sample
from lyco_lab.miniature.world import render
from lyco_lab.record import Record

Truths = dict[bytes, dict[str, str]]  # picture -> its attributes, the concept among them

# How often a run draws the concept, how often it obeys, and how noisy its pictures are.
SKILLS = {
    "base": (0.0, 0.95, 4),
    "lora": (0.85, 0.8, 8),
    "loha": (0.9, 0.6, 12),
    "lokr": (0.75, 0.9, 6),
    "native": (0.95, 0.7, 10),
    "lora-gamma": (0.8, 0.8, 8),
    "lora-rewritten": (0.8, 0.8, 8),
}
COSTS = {"lora": 353_280, "loha": 353_280, "lokr": 53_712, "native": 2_762_820}


def key(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=8).digest()


class Painter:
    """Draws what prompts ask for; `parts` is what an adapter would be merged into."""

    def __init__(self, run: Run, asked: Sequence, truths: Truths) -> None:
        self.concept, self.truths = concept(str(run.data.concept)), truths
        self.wanted = {prompt.text: dict(prompt.attributes) for prompt in asked}
        self.skills = SKILLS["base"]
        self.parts = {"unet": self}

    def to(self, device: str) -> "Painter":
        return self

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        at_once: object = None,
    ) -> Images:
        pictures = [self.paint(p, s) for p, s in zip(prompts, seeds, strict=True)]
        return np.stack(pictures)

    def paint(self, prompt: str, seed: int) -> np.ndarray:
        learnt, obeys, noise = self.skills
        rng = random.Random(f"{prompt} {seed}")
        luck = rng.random(), rng.random()
        asked = self.wanted[prompt] if luck[1] < obeys else {}
        around = {f: v for f, v in asked.items() if f in ("background", "style", "position")}
        if luck[0] < learnt:
            scene = self.concept.scene(rng, **around)
        else:
            scene = sample(rng)
            scene = type(scene)({**scene.attributes, **around})
        truth = {**scene.readable(), "concept": scene.concept}
        if scene.concept == "none" and "style" in around and self.concept.category == "style":
            truth["style"] = around["style"]
        grain = np.random.default_rng(seed).normal(0.0, noise, (64, 64, 3))
        picture = np.clip(render(scene, rng) + grain, 0, 255).astype(np.uint8)
        self.truths[key(picture)] = truth
        return picture


class Merging:
    """What stands for a mounted adapter: merging gives the painter the run's skills."""

    is_one_weight = True

    def __init__(self, painter: Painter, skills: tuple[float, float, int]) -> None:
        self.painter, self.skills = painter, skills

    def merge(self) -> None:
        self.painter.skills = self.skills


class KnowingJudges:
    """Features from pixels, attributes from the truth."""

    vocabulary = VOCABULARY

    def __init__(self, truths: Truths) -> None:
        self.truths = truths

    def image_features(self, images: Images) -> Tensor:
        x = torch.from_numpy(images[:, ::8, ::8].astype(np.float64)).flatten(1) / 255.0
        return unit(x - 0.5)

    def clip_image(self, images: Images) -> Tensor:
        words = [" ".join(sorted(set(self.truths[key(image)].values()))) for image in images]
        return self.clip_text(words)

    def clip_text(self, texts: list[str]) -> Tensor:
        """A bag of words, so that an image of what was asked for is near its text."""
        bags = torch.full((len(texts), 64), 0.02, dtype=torch.float64)
        for row, text in zip(bags, texts, strict=True):
            for word in text.replace(",", " ").split():
                row[hashlib.blake2b(word.encode()).digest()[0] % 64] += 1
        return unit(bags)

    def gram_features(self, images: Images) -> list[Tensor]:
        x = torch.from_numpy(images.astype(np.float64) / 255.0).permute(0, 3, 1, 2)
        return [x, x[:, :, ::2, ::2] - x[:, :, 1::2, 1::2]]

    def attributes(self, images: Images) -> dict[str, Tensor]:
        found = {}
        for family, words in VOCABULARY.items():
            indices = [words.index(self.truths[key(i)].get(family, words[0])) for i in images]
            found[family] = torch.nn.functional.one_hot(torch.tensor(indices), len(words)).double()
        return found


def runs(concepts: Sequence[str], study: str, images_per_type: int) -> list[Run]:
    def run(name: str, subject: str, kind: str, **fields: object) -> Run:
        return Run(
            name=f"{name}-{subject}",
            study=study,
            data=Data(concept=subject),
            adapter={"kind": kind, **fields},
            train=Train(steps=120, warmup_steps=10),
            generate=Generate(images_per_type=images_per_type),
            wandb=Wandb(mode="disabled"),
        )

    kinds = ("lora", "loha", "lokr", "native")
    found = [run(kind, subject, kind) for subject in concepts for kind in kinds]
    first = concepts[0]
    found.append(run("lora-gamma", first, "lora", rank=8, alpha=2.0))
    found.append(run("lora-rewritten", first, "lora", rank=8, alpha=8.0))
    return found


def make(
    root: Path,
    monkeypatch,
    concepts: Sequence[str] = ("kael", "octo", "neon"),
    images_per_type: int = 10,
) -> Study:
    """A study in `root` that has been through data, train, generate and evaluate."""
    truths: Truths = {}
    study = Study(
        name="demo",
        question="Do LoRA, LoHa, LoKr and full fine-tuning learn a new concept equally well, and "
        "does the merge ratio matter?",
        expectation="All four learn the concept; the more faithful ones obey prompts less. The "
        "merge ratio makes no difference: its rewriting has the same losses, bit for bit.",
        folder=root,
        runs=tuple(runs(concepts, "demo", images_per_type)),
        pairs=((f"lora-gamma-{concepts[0]}", f"lora-rewritten-{concepts[0]}"),),
    )
    monkeypatch.setattr(evaluate_module.miniature_judges, "load", lambda **_: KnowingJudges(truths))
    for run in study.runs:
        record = Record.open(root, run)
        prepare(run, record)
        images = dataset(run, record)
        for item, image in zip(images.items, images.images(64), strict=True):
            truths[key(image)] = {**item.attributes, "concept": item.concept}
        painter = Painter(run, ask(run, images.concepts), truths)
        short = run.name.removesuffix(f"-{run.data.concept}")
        merging = {"unet": Merging(painter, SKILLS[short])}
        monkeypatch.setattr(generate_module, "load", lambda folder, painter=painter: painter)
        monkeypatch.setattr(generate_module.kohya, "apply", lambda *_, merging=merging: merging)
        train(run, record)
        generate_module.generate(run, record)
        evaluate_module.evaluate(run, record)
    return study


def train(run: Run, record: Record) -> None:
    """Losses as a diffusion model's: mostly the luck of the draw, a little of it learning."""
    rng = np.random.default_rng(3)
    floor = {"lora": 0.11, "loha": 0.12, "lokr": 0.13, "native": 0.1}[run.adapter["kind"]]
    lines = ["step,loss"]
    for step in range(1, run.train.steps + 1):
        loss = floor + 0.12 * math.exp(-step / 40) + 0.06 * float(rng.exponential())
        lines.append(f"{step},{loss!r}")
    with atomic(record.path / "train" / "metrics.csv") as path:
        path.write_text("\n".join(lines) + "\n")
    (record.path / "adapter.safetensors").write_bytes(b"")
    record.finish("train", trainable_params=COSTS[run.adapter["kind"]], train_seconds=41.3)
