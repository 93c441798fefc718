"""Numbers that the text quotes, as LaTeX macros: no number is typed into main.tex."""

from collections.abc import Sequence

import pandas as pd

from paper import data, latex
from paper.figures.gamma_equivalence import equal_steps
from paper.paths import TABLES


def macros(table: pd.DataFrame, pairs: dict[str, pd.DataFrame]) -> dict[str, str]:
    runs = data.compared(table, pairs)
    runs = runs[~runs["adapter"].isin([data.BASE, data.REAL])]
    return {
        "conceptCount": str(runs["concept"].nunique()),
        "adapterCount": str(runs["adapter"].nunique()),
        "runCount": str(len(runs)),
        "pairedSteps": str(sum(len(rows) for rows in pairs.values())),
        "equalSteps": str(sum(equal_steps(rows) for rows in pairs.values())),
    }


def main(argv: Sequence[str] | None = None) -> None:
    given = data.arguments(__doc__ or "", TABLES, argv)
    found = macros(data.results(given.table), data.gamma_pairs(given.gamma))
    lines = [rf"\newcommand{{\{name}}}{{{value}}}" for name, value in found.items()]
    latex.save("\n".join(lines) + "\n", given.out, "numbers")


if __name__ == "__main__":
    data.script(main)
