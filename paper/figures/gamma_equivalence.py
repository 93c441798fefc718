"""Figure: the losses of a run with gamma and of its rewriting without, and their difference.

The difference is drawn in units in the last place of the float32 that a loss is, so that a single
wrong bit would be seen; bitwise equal runs are a line at zero.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paper import data, style
from paper.paths import FIGURES

WITH, WITHOUT = style.COLOURS[4], style.INK


@style.applied
def draw(pairs: dict[str, pd.DataFrame]) -> Figure:
    figure = Figure(figsize=(style.WIDTH_IN, 2.9 * len(pairs)), layout="constrained")
    grid = figure.subplots(2 * len(pairs), 1, height_ratios=[3, 1] * len(pairs), squeeze=False)
    for index, (pair, rows) in enumerate(pairs.items()):
        losses_ax, difference_ax = grid[2 * index : 2 * index + 2, 0]
        difference_ax.sharex(losses_ax)
        _losses(losses_ax, rows)
        _difference(difference_ax, rows)
        if len(pairs) > 1:
            losses_ax.set_title(pair, loc="left")
    return figure


def units_in_the_last_place(rows: pd.DataFrame) -> np.ndarray:
    """How many float32 values the rewritten loss lies above the other."""
    left, right = (rows[column].to_numpy(np.float64) for column in data.LOSSES)
    return (right - left) / np.spacing(np.abs(left).astype(np.float32)).astype(np.float64)


def verdict(rows: pd.DataFrame) -> str:
    equal, steps = equal_steps(rows), len(rows)
    if equal == steps:
        return f"all {steps} losses are bitwise equal"
    return f"{equal} of {steps} losses are bitwise equal"


def equal_steps(rows: pd.DataFrame) -> int:
    """At how many steps the two losses have the same bits."""
    left, right = (rows[column].to_numpy(np.float64).view(np.int64) for column in data.LOSSES)
    return int((left == right).sum())


def _losses(ax: Axes, rows: pd.DataFrame) -> None:
    ax.plot(
        rows["step"],
        rows["loss_gamma"],
        color=WITH,
        linewidth=2.6,
        alpha=0.75,
        solid_joinstyle="round",
    )
    ax.plot(rows["step"], rows["loss_rewritten"], color=WITHOUT, linewidth=0.7)
    ax.set_ylabel("Loss")
    ax.set_ylim(0, 1.3 * rows[["loss_gamma", "loss_rewritten"]].max().max())  # for the labels
    ax.tick_params(labelbottom=False)
    ax.text(
        1, 1, r"wide: with $\gamma$", color="#2b86b8", transform=ax.transAxes, ha="right", va="top"
    )
    ax.text(
        1,
        0.89,
        r"thin: rewritten, without $\gamma$",
        color=WITHOUT,
        transform=ax.transAxes,
        ha="right",
        va="top",
    )


def _difference(ax: Axes, rows: pd.DataFrame) -> None:
    difference = units_in_the_last_place(rows)
    ax.axhline(0, color=style.RULE, linewidth=0.6)
    ax.plot(rows["step"], difference, color=WITHOUT, linewidth=0.9)
    reach = max(2.0, 1.15 * float(np.nanmax(np.abs(difference), initial=0.0)))
    ax.set_ylim(-reach, reach)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    ax.set_ylabel("Difference\n(ulp)", linespacing=1.0)
    ax.set_xlabel("Step")
    ax.text(1, 0.97, verdict(rows), transform=ax.transAxes, ha="right", va="top")


def main(argv: Sequence[str] | None = None) -> None:
    given = data.arguments(__doc__ or "", FIGURES, argv)
    style.save(draw(data.gamma_pairs(given.gamma)), given.out, "gamma_equivalence")


if __name__ == "__main__":
    data.script(main)
