"""Read the committed tables of the demo, and say what is missing from them."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from lyco_lab.adapters import ADAPTERS
from lyco_lab.errors import UserError
from paper.paths import DRIFT, GAMMA, KEPT, RESULTS

BASE = "base"  # the adapter column of the rows of the model without any,
REAL = "real"  # and of the training images, measured as if they had been generated
NAMES = ("run", "concept", "adapter")
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
LOSSES = ("loss_gamma", "loss_rewritten")


def results(path: Path) -> pd.DataFrame:
    """One row per run, and a row of the base model per concept; the metrics as numbers.

    Standard errors (`METRIC_se`) are NaN where the table has none.
    """
    table = _read(path, (*NAMES, *METRICS))
    errors = [f"{metric}_se" for metric in METRICS]
    table = table.reindex(columns=[*NAMES, *METRICS, *errors])
    try:
        table[[*METRICS, *errors]] = table[[*METRICS, *errors]].apply(pd.to_numeric)
    except ValueError as error:
        raise UserError(f"{path}: a metric is not a number: {error}") from error
    return table


def compared(table: pd.DataFrame, pairs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The rows that compare adapters: without the runs of a gamma pair, which compare settings."""
    paired = {run for pair in pairs for run in pair.split(" = ")}
    return table[~table["run"].isin(paired)]


def gamma_pairs(path: Path) -> dict[str, pd.DataFrame]:
    """'RUN = REWRITTEN RUN' -> step and losses, every bit kept."""
    table = _read(path, ("pair", "step", *LOSSES))
    try:
        table["step"] = table["step"].astype(int)
        for column in LOSSES:
            table[column] = table[column].map(float.fromhex)
    except ValueError as error:
        raise UserError(f"{path}: needs whole steps and float.hex() losses: {error}") from error
    return {str(pair): rows for pair, rows in table.groupby("pair", sort=False)}


CERTIFIED = (
    "adapter",
    "optimizer",
    "dtype",
    "keep",
    "steps",
    "delta_error",
    "loss_error",
    "rounding",
)


def certified(path: Path) -> pd.DataFrame:
    """What `lyco-lab verify --out` wrote, its errors as numbers."""
    table = _read(path, CERTIFIED)
    numbers = ["steps", "delta_error", "loss_error", "rounding"]
    try:
        table[numbers] = table[numbers].apply(pd.to_numeric)
    except ValueError as error:
        raise UserError(f"{path}: an error is not a number: {error}") from error
    return table


def display(adapter: str) -> str:
    """An adapter's name as its class spells it: 'lora' is LoRA."""
    references = {BASE: "base model", REAL: "training images"}
    if adapter in references:
        return references[adapter]
    return ADAPTERS[adapter].__name__ if adapter in ADAPTERS else adapter


def arguments(description: str, out: Path, argv: Sequence[str] | None) -> argparse.Namespace:
    """What every script takes: the tables it may read, and `out`, a folder."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, default, text in (
        ("table", RESULTS, "the runs' results"),
        ("gamma", GAMMA, "the losses of the gamma pairs"),
        ("drift", DRIFT, "runs rewritten by a gamma that is rounded"),
        ("kept", KEPT, "rewritten runs of which one setting was left as it was"),
        ("out", out, "the folder to write to"),
    ):
        parser.add_argument(f"--{name}", type=Path, default=default, help=f"{text} (%(default)s)")
    return parser.parse_args(argv)


def script(main: Callable[[], None]) -> None:
    """Run a script's `main`; what the user can put right is told in one line."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{error}")


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: `lyco-lab run experiments/demo` writes {path.name} into "
            "runs/demo, and the copy beside the study is what the paper is built from"
        )
    table = pd.read_csv(path, dtype=str)
    missing = [column for column in columns if column not in table]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; it has {list(table)}")
    if table.empty:
        raise UserError(f"{path} has no rows")
    return table
