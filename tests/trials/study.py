"""Tiny studies of the embedded model, and what of their results has to be the same every time."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lyco_lab.files import digest_of

ROOT = Path(__file__).parents[2]
WALL_CLOCK = ("train_seconds",)  # columns that no two runs of a study share

HEAD = """
question: Does it end with the same numbers?
expectation: It does, whatever happens on the way.
base: {base}
set:
  train: {{steps: 4, batch_size: 2, warmup_steps: 1, checkpoint_every: 2, lr: 1e-2}}
  generate: {{types: [trigger, alter], images_per_type: 2, steps: 2, batch_size: 2}}
  wandb: {{mode: disabled}}
runs:
"""
LORA = """
  - name: lora
    set: {{data: {{concept: kael, limit: 6}}, adapter: {{kind: lora, rank: 2, alpha: 4.0}}}}
"""
LONGER = """
  - name: longer
    set:
      data: {{concept: kael, limit: 6}}
      adapter: {{kind: lora, rank: 2, alpha: 4.0}}
      train: {{steps: 6}}
"""
LOKR = """
  - name: lokr
    set: {{data: {{concept: octo, limit: 6}}, adapter: {{kind: lokr}}}}
"""
# `lora` with gamma = 1/2 instead of 2: the same change of the weights by s = 2.
TWIN = """
  - name: twin
    set:
      data: {{concept: kael, limit: 6}}
      adapter: {{kind: lora, rank: 2, alpha: 1.0}}
      optimizer: {{eps: 5e-9, weight_decay: 0.005}}
      train: {{lr: 2e-2, init_scale: 2, grad_clip: 0.5}}
"""
OWN = """
  - name: own
    set:
      data: {{folder: "{pictures}", trigger: sks}}
      adapter: {{kind: lora, rank: 2, alpha: 4.0}}
"""
WHOLE = (LORA, LONGER, LOKR, TWIN, OWN)
SHORT = (LORA, LONGER, LOKR, TWIN)  # for what has to run often


UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Finished:
    """A study that ran undisturbed."""

    study: Path
    root: Path  # where its runs lie

    @property
    def name(self) -> str:
        return self.study.name


def write(folder: Path, runs: Sequence[str]) -> Path:
    """A study of these runs in `folder`, beside the pictures that they may need."""
    pictures = folder.parent / "pictures"
    draw(pictures)
    folder.mkdir(parents=True, exist_ok=True)
    base = ROOT / "experiments" / "base.yaml"
    text = "".join((HEAD, *runs)).format(base=base, pictures=pictures)
    (folder / "study.yaml").write_text(text)
    return folder


def draw(folder: Path) -> None:
    """Six pictures of coloured circles with captions."""
    if folder.is_dir():  # new files would have new times, which caches look at
        return
    folder.mkdir(parents=True)
    y, x = np.mgrid[:64, :64]
    for index, (name, colour) in enumerate(2 * list(COLOURS.items())):
        inside = (x - 20 - 4 * index) ** 2 + (y - 32) ** 2 < (10 + 2 * index) ** 2
        image = np.where(inside[..., None], np.array(colour, np.uint8), np.uint8(235))
        Image.fromarray(image).save(folder / f"{index:04d}.png")
        (folder / f"{index:04d}.txt").write_text(f"sks circle, {name}\n")


COLOURS = {"red": (220, 40, 30), "green": (40, 180, 60), "blue": (40, 70, 220)}


def finished(work: Path, name: str, runs: Sequence[str]) -> Finished:
    """The study of this name, run once below `work` by a process of its own."""
    made = Finished(write(work / name, runs), work / f"{name}-finished")
    if not (made.root / name / "report.html").is_file():
        done = subprocess.run(
            command("run", str(made.study), "--out", str(made.root), "--workers", "1"),
            capture_output=True, text=True, env=environment(),
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the undisturbed study failed:\n{done.stderr}")
    return made


def command(*arguments: str) -> list[str]:
    """Of a process of its own."""
    return [sys.executable, "-m", "lyco_lab", *arguments]


def environment() -> dict[str, str]:
    """In which a process finds this checkout's library, wherever it is started."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def copy(source: Path, target: Path) -> Path:
    """A copy of a folder whose files share nothing with it; hard links among them stay so."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)
    return target


def tables(root: Path) -> dict[str, str]:
    """The study's own tables, by path, without the columns that hold times."""
    names = ("results.csv", "gamma.csv", "concepts.csv")
    return {
        str(path.relative_to(root)): _without_times(path)
        for name in names
        for path in sorted(root.glob(f"*/{name}"))
    }


def results(root: Path) -> dict[str, str]:
    """All that a study's numbers consist of, by path: tables, adapters, losses, images, scores."""
    found = tables(root)
    runs = ("adapter.safetensors", "train/metrics.csv", "evaluate/metrics.json")
    patterns = [f"*-????????/{name}" for name in runs]
    patterns += ["*-????????/generate/**/*.png", "base/*/**/*.png"]
    for pattern in patterns:
        for path in root.glob(pattern):
            found[str(path.relative_to(root))] = digest_of(path)
    for pattern in ("*-????????/*/images.parquet", "base/*/images.parquet"):
        for path in root.glob(pattern):
            found[str(path.relative_to(root))] = _parquet(path)
    for path in root.glob("base/*/references*.json"):
        found[str(path.relative_to(root))] = json.dumps(_json(path), sort_keys=True)
    return found


def differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The paths at which two studies do not have the same."""
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def within(ours: dict[str, str], theirs: dict[str, str]) -> bool:
    """Whether tables are those of another study with some rows left out."""
    for name, text in ours.items():
        whole = json.loads(theirs.get(name, "[]"))
        if text == UNREADABLE or any(row not in whole for row in json.loads(text)):
            return False
    return bool(ours)


def _without_times(path: Path) -> str:
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
    except (OSError, ValueError, csv.Error):
        return UNREADABLE
    return json.dumps([{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows])


def _parquet(path: Path) -> str:
    try:
        return str(pd.read_parquet(path).to_csv(index=False))
    except Exception:  # whatever a reader makes of damaged bytes
        return UNREADABLE


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return UNREADABLE
