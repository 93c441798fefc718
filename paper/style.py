"""How the paper's figures look: its fonts and widths, colours that anyone can tell apart.

Colour never carries the meaning alone: every series has a marker or a dash of its own, and its
name is written beside it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Annotation  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402

from lyco_lab.files import atomic  # noqa: E402

P = ParamSpec("P")
R = TypeVar("R")

Place = tuple[float, float, str, str]  # offset in points, horizontal and vertical alignment

WIDTH_IN = 5.5  # the width of the text
INK, MUTED, RULE = "#222222", "#6b6b6b", "#bdbdbd"
# Okabe and Ito's palette, its yellow left out: too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

RC: dict[Any, Any] = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
}


def applied(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a function that draws or saves under the paper's style, and leave matplotlib's alone."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context():
            matplotlib.rcParams.update(RC)
            return draw(*args, **kwargs)

    return styled


@applied
def save(figure: Figure, folder: Path, name: str) -> None:
    """NAME.pdf and NAME.png, the same bytes for the same table."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
    for kind, facts in metadata.items():
        with atomic(folder / f"{name}.{kind}") as temporary:
            figure.savefig(temporary, format=kind, dpi=300, metadata=facts)


def label_points(
    ax: Axes,
    names: Sequence[str],
    xy: Sequence[tuple[float, float]],
    colours: Sequence[str],
    others: Sequence[tuple[float, float]] = (),
) -> None:
    """Write each name beside its point, clear of the other names and of all points.

    `others`: further points to stay clear of. Call it when the axes have their final limits.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    half_px = 8.0
    points = ax.transData.transform([*xy, *others])
    marks = [Bbox([(x - half_px, y - half_px), (x + half_px, y + half_px)]) for x, y in points]
    inside = ax.get_window_extent()
    places = list(_places())

    def box(name: str, point: tuple[float, float], place: Place) -> Bbox:
        text = _write(ax, name, point, place, "none")
        extent = text.get_window_extent()
        text.remove()
        return extent

    boxes = [[box(n, point, place) for place in places] for n, point in zip(names, xy, strict=True)]

    def cost(own: int, choice: int) -> float:
        extent, (dx, dy, _, _) = boxes[own][choice], places[choice]
        taken = [boxes[i][c] for i, c in enumerate(chosen) if i != own]
        outside = extent.width * extent.height - _overlap(extent, inside)
        crowding = sum(_overlap(extent, other) for other in [*taken, *marks])
        return crowding + 2 * outside + 2 * math.hypot(dx, dy)

    chosen = [0] * len(names)
    for _ in range(5):  # each in turn, given the others; more rounds change nothing
        for own in range(len(names)):
            chosen[own] = min(range(len(places)), key=lambda choice: cost(own, choice))
    for name, point, choice, colour in zip(names, xy, chosen, colours, strict=True):
        _write(ax, name, point, places[choice], colour)


def _write(
    ax: Axes, name: str, point: tuple[float, float], place: Place, colour: str
) -> Annotation:
    dx, dy, ha, va = place
    return ax.annotate(
        name, point, (dx, dy), textcoords="offset points", ha=ha, va=va, color=colour
    )


def _places() -> Iterator[Place]:
    """Offsets in points with their alignments, the preferred ones first."""
    for gap in (6.0, 12.0, 20.0):
        yield from ((gap, 0.0, "left", "center_baseline"), (-gap, 0.0, "right", "center_baseline"))
        yield from ((0.0, gap, "center", "bottom"), (0.0, -gap, "center", "top"))
        for dy, va in ((gap, "bottom"), (-gap, "top")):
            yield from ((gap * 0.6, dy * 0.6, "left", va), (-gap * 0.6, dy * 0.6, "right", va))


def _overlap(left: Bbox, right: Bbox) -> float:
    common = Bbox.intersection(left, right)
    return 0.0 if common is None else common.width * common.height
