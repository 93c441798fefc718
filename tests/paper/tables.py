"""Small tables of the demo's form, for the scripts of paper/."""

import csv
from pathlib import Path

CONCEPTS = ("kael", "octo")
SCORES = {"base": (0.7, 0.2), "lora": (0.62, 0.66), "loha": (0.65, 0.6), "native": (0.5, 0.8)}
METRICS = (
    "image_similarity_train",
    "image_similarity_alter",
    "text_similarity_alter",
    "vendi_trigger",
    "style_loss",
    "concept_accuracy_trigger",
    "attribute_accuracy_alter",
    "trainable_params",
)
PAIR = "gamma = gamma-folded"


def write(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def result(run: str, concept: str, adapter: str, text: float, image: float) -> dict:
    row = {"run": run, "concept": concept, "adapter": adapter} | dict.fromkeys(METRICS, 0.5)
    row |= {"text_similarity_alter": text, "image_similarity_alter": image}
    return row | {"trainable_params": "" if adapter in ("base", "real") else 91136}


def results(folder: Path) -> Path:
    rows = []
    for shift, concept in enumerate(CONCEPTS):
        for adapter, (text, image) in SCORES.items():
            run = "base" if adapter == "base" else f"{adapter}-{concept}"
            rows.append(result(run, concept, adapter, text, image + shift / 500))
        rows.append(result("real", concept, "real", 0.7, 0.95))
    for run in PAIR.split(" = "):
        rows.append(result(run, "kael", "lora", 0.1, 0.1))
    return write(folder / "results.csv", rows)


def losses(folder: Path, *, steps: int = 20, wrong_at: int | None = None) -> Path:
    """Losses that are float32 values; at `wrong_at` the twin's is the next one above."""
    rows = []
    for step in range(1, steps + 1):
        loss = 0.5 + 1 / (1 + step // 4) / 4
        twin = loss + (2.0**-24 if step == wrong_at else 0.0)
        columns = {"loss_gamma": loss.hex(), "loss_rewritten": twin.hex()}
        rows.append({"pair": PAIR, "step": step} | columns)
    return write(folder / "gamma.csv", rows)
