"""Figure: fidelity against controllability of the demo's adapters, one panel per concept.

Up: images on prompts that alter the content look more like the concept's own. Right: they follow
those prompts better. Training moves a model up and to the left of where it starts.
"""

import math
from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper import data, style
from paper.paths import FIGURES

X, Y = "text_similarity_alter", "image_similarity_alter"
PANELS_PER_ROW = 3


@style.applied
def draw(table: pd.DataFrame) -> Figure:
    """`table`: the rows of `data.compared`. The training images are no model, so no point."""
    table = table[table["adapter"] != data.REAL]
    concepts = list(dict.fromkeys(table["concept"]))
    adapters = [name for name in dict.fromkeys(table["adapter"]) if name != data.BASE]
    columns = min(len(concepts), PANELS_PER_ROW)
    rows = math.ceil(len(concepts) / columns)
    panel_in = style.WIDTH_IN / PANELS_PER_ROW
    figure = Figure(figsize=(panel_in * max(columns, 2), 1.9 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for ax, concept in zip(panels, concepts, strict=False):
        _panel(ax, table[table["concept"] == concept], adapters)
        ax.set_title(concept, loc="left")
    for ax in panels[len(concepts) :]:
        ax.set_visible(False)
    panels[0].margins(0.18)
    figure.supxlabel("Text similarity (controllability)", fontsize=9)
    figure.supylabel("Image similarity (fidelity)", fontsize=9)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is written next must not move what it is placed by
    for ax, concept in zip(panels, concepts, strict=False):
        _names(ax, table[table["concept"] == concept], adapters)
    return figure


def _look(adapter: str, adapters: list[str]) -> tuple[str, str]:
    """(colour, marker), the same for an adapter in every panel."""
    if adapter == data.BASE:
        return style.MUTED, "+"
    index = adapters.index(adapter)
    return style.COLOURS[index % len(style.COLOURS)], style.MARKERS[index % len(style.MARKERS)]


def _panel(ax: Axes, rows: pd.DataFrame, adapters: list[str]) -> None:
    for _, row in rows.iterrows():
        colour, marker = _look(row["adapter"], adapters)
        errors = {"xerr": row[f"{X}_se"], "yerr": row[f"{Y}_se"]}
        shown = {key: value for key, value in errors.items() if math.isfinite(value)}
        ax.errorbar(
            row[X],
            row[Y],
            **shown,
            color=colour,
            marker=marker,
            markersize=5,
            markeredgewidth=1.2 if marker == "+" else 0,
            elinewidth=0.6,
            linestyle="none",
        )


def _names(ax: Axes, rows: pd.DataFrame, adapters: list[str]) -> None:
    first = rows.drop_duplicates("adapter")
    style.label_points(
        ax,
        [data.display(adapter) for adapter in first["adapter"]],
        list(zip(first[X], first[Y], strict=True)),
        [_look(adapter, adapters)[0] for adapter in first["adapter"]],
        others=[*zip(rows[X], rows[Y], strict=True), *_bar_ends(rows)],
    )


def _bar_ends(rows: pd.DataFrame) -> Iterator[tuple[float, float]]:
    for x, y, x_se, y_se in rows[[X, Y, f"{X}_se", f"{Y}_se"]].itertuples(index=False):
        if math.isfinite(x_se):
            yield from ((x - x_se, y), (x + x_se, y))
        if math.isfinite(y_se):
            yield from ((x, y - y_se), (x, y + y_se))


def main(argv: Sequence[str] | None = None) -> None:
    given = data.arguments(__doc__ or "", FIGURES, argv)
    table = data.compared(data.results(given.table), data.gamma_pairs(given.gamma))
    style.save(draw(table), given.out, "fidelity_controllability")


if __name__ == "__main__":
    data.script(main)
