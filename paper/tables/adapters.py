"""Table: what each adapter of the demo reaches, as the mean over the concepts.

The last row is the training images themselves, measured as if they had been generated.
"""

from collections.abc import Sequence

import pandas as pd

from paper import data, latex
from paper.paths import TABLES

COLUMNS = {
    "image_similarity_alter": ("Image sim.", 2),
    "text_similarity_alter": ("Text sim.", 2),
    "vendi_trigger": ("Vendi", 2),
    "style_loss": ("Style loss", 3),
    "concept_accuracy_trigger": ("Concept acc.", 2),
    "attribute_accuracy_alter": ("Attribute acc.", 2),
    "trainable_params": ("Parameters", 0),
}


def rows(table: pd.DataFrame) -> list[list[str]]:
    """One row per adapter, in the table's order; the training images last."""
    means = table.groupby("adapter", sort=False)[list(COLUMNS)].mean()
    order = [name for name in means.index if name != data.REAL]
    if data.REAL in means.index:
        order.append(data.REAL)
    return [
        [
            latex.escape(data.display(name)),
            *(latex.number(means.loc[name, c], digits) for c, (_, digits) in COLUMNS.items()),
        ]
        for name in order
    ]


def main(argv: Sequence[str] | None = None) -> None:
    given = data.arguments(__doc__ or "", TABLES, argv)
    table = data.compared(data.results(given.table), data.gamma_pairs(given.gamma))
    head = ["", *(name for name, _ in COLUMNS.values())]
    latex.save(latex.tabular(head, rows(table)), given.out, "adapters")


if __name__ == "__main__":
    data.script(main)
