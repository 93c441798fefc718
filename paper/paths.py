"""Where the paper's scripts read and write. `build` folders hold what can be made again."""

from pathlib import Path

PAPER = Path(__file__).resolve().parent
DEMO = PAPER.parent / "experiments" / "demo"

RESULTS = DEMO / "results.csv"  # one row per run, and one of the base model per concept
GAMMA = DEMO / "gamma.csv"  # the losses of the gamma pairs, step by step

GAMMA_STUDY = PAPER.parent / "experiments" / "gamma"
DRIFT = GAMMA_STUDY / "drift.csv"  # rewritten runs that are equal up to rounding, after n steps
KEPT = GAMMA_STUDY / "kept.csv"  # rewritten runs of which one setting was left as it was

FIGURES = PAPER / "figures" / "build"
TABLES = PAPER / "tables" / "build"
