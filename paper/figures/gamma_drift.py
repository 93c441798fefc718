"""Figure: what is left of equality when gamma is rounded, and when one setting is left behind.

Left, gamma = 0.03, where no s is a power of two: the two runs round differently, and training
amplifies it as it amplifies any rounding. Right, gamma = 2**-12, where the rewritten runs are equal
in every bit, once all settings have moved: one of them is left as it was.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper import data, style
from paper.paths import FIGURES

ERROR = r"$\Vert\Delta W' - \Delta W\Vert\,/\,\Vert\Delta W\Vert$"
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD", "radam": "RAdam"}
DASHES = {"fp32": ("float32", "-"), "bf16": ("bfloat16", ":")}
SETTINGS = {
    "lr": "learning rate",
    "init_scale": "start",
    "grad_clip": "clipping norm",
    "weight_decay": "weight decay",
    "eps": r"$\epsilon$",
    "unrectified_lr": "rate of first steps",
}


@style.applied
def draw(drift: pd.DataFrame, kept: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(style.WIDTH_IN, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.05])
    looks = {pair: _look(index) for index, pair in enumerate(_series(pd.concat([drift, kept])))}
    _drift(left, drift, looks)
    _kept(right, kept, looks)
    handles = [
        Line2D([], [], linestyle="none", markersize=4, label=_name(*pair), **look)
        for pair, look in looks.items()
    ]
    for dtype, dashes in DASHES.values():
        handles.append(Line2D([], [], color=style.INK, linestyle=dashes, linewidth=1, label=dtype))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    return figure


Looks = dict[tuple[str, str], dict[str, str]]  # (adapter, optimizer) -> colour and marker


def _series(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The pairs of adapter and optimizer, in the order of the table."""
    return list(dict.fromkeys(zip(table["adapter"], table["optimizer"], strict=True)))


def _look(index: int) -> dict[str, str]:
    return {"color": style.COLOURS[index], "marker": style.MARKERS[index]}


def _name(adapter: str, optimizer: str) -> str:
    return f"{data.display(adapter)}, {OPTIMIZERS.get(optimizer, optimizer)}"


def _drift(ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    for (adapter, optimizer, dtype), rows in table.groupby(["adapter", "optimizer", "dtype"]):
        rows = rows.sort_values("steps")
        ax.plot(
            rows["steps"],
            rows["delta_error"],
            linestyle=DASHES[dtype][1],
            linewidth=1.1,
            markersize=3.5,
            **looks[adapter, optimizer],
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    steps = sorted(table["steps"].unique())
    ax.set_xticks(steps, [str(step) for step in steps])
    ax.minorticks_off()
    ax.set_xlabel("Steps")
    ax.set_ylabel(ERROR)
    ax.set_title(r"Rounded: $\gamma = 0.03$", loc="left")


def _kept(ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    names = [name for name in SETTINGS if (table["keep"] == name).any()]
    for (adapter, optimizer), rows in table.groupby(["adapter", "optimizer"]):
        rows = rows[rows["keep"].isin(names)]
        heights = [names.index(name) for name in rows["keep"]]
        offset = (list(looks).index((adapter, optimizer)) - (len(looks) - 1) / 2) * 0.11
        ax.plot(
            rows["delta_error"],
            np.array(heights, dtype=float) + offset,
            linestyle="none",
            markersize=4,
            **looks[adapter, optimizer],
        )
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), [SETTINGS[name] for name in names])
    ax.invert_yaxis()
    ax.grid(axis="x", color=style.RULE, linewidth=0.4, alpha=0.6)
    ax.set_xlabel(f"{ERROR} after {int(table['steps'].max())} steps")
    ax.set_title("One setting left as it was", loc="left")


def main(argv: Sequence[str] | None = None) -> None:
    given = data.arguments(__doc__ or "", FIGURES, argv)
    tables = data.certified(given.drift), data.certified(given.kept)
    style.save(draw(*tables), given.out, "gamma_drift")


if __name__ == "__main__":
    data.script(main)
