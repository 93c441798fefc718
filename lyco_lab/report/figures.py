"""Charts as inline SVG, drawn by hand: small, sharp at every size, and readable in the dark.

Colours are CSS classes (`s0` to `s7` for series, see page.html.j2), so that one drawing follows
the reader's light or dark scheme. Every series also has a marker shape of its own. Drawings are
360 units wide, about the width of a phone, and are laid side by side where there is room: text
keeps its size instead of shrinking with the page.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

SERIES = 8
WIDTH, HEIGHT = 360, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 42
Box = tuple[float, float, float, float]  # left, top, right, bottom
LETTER = 6.1  # width of a letter of the labels' font, on average


@dataclass(frozen=True)
class Point:
    """A model in the scatter. `role`: run, base (the model before training) or real (images)."""

    label: str
    series: int
    x: float
    y: float
    x_error: float
    y_error: float
    role: str = "run"


@dataclass(frozen=True)
class Line:
    label: str
    series: int
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Axes:
    """The plotting area: data coordinates to drawing units, and the grid with its numbers."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    x_title: str
    y_title: str

    def px(self, x: float) -> float:
        share = (x - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def py(self, y: float) -> float:
        share = (y - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def svg(self) -> str:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = []
        for x in ticks(self.x_low, self.x_high, 5):
            parts.append(f'<path class="grid" d="M{self.px(x)} {TOP}V{bottom}"/>')
            parts.append(_text(self.px(x), bottom + 16, number(x), "tick", "middle"))
        for y in ticks(self.y_low, self.y_high, 5):
            parts.append(f'<path class="grid" d="M{LEFT} {self.py(y)}H{right}"/>')
            parts.append(_text(LEFT - 7, self.py(y) + 4, number(y), "tick", "end"))
        middle = (LEFT + right) / 2
        parts.append(_text(middle, HEIGHT - 6, self.x_title, "axis", "middle"))
        turned = f'transform="rotate(-90 12 {(TOP + bottom) / 2})"'
        parts.append(_text(12, (TOP + bottom) / 2 + 4, self.y_title, "axis", "middle", turned))
        return "".join(parts)


def scatter(points: Sequence[Point], axes: Axes, description: str) -> str:
    """Points with error bars and their names beside them."""
    shown = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    bars = "".join(_error_bars(p, axes) for p in shown)
    marks = "".join(_mark(p, axes) for p in shown)
    names = "".join(_names(shown, axes))
    return _figure(axes.svg() + bars + marks + names, description)


def curves(lines: Sequence[Line], axes: Axes, description: str, css: str = "line") -> str:
    """Lines over steps, the first drawn first."""
    drawn = [
        f'<path class="{css} s{line.series % SERIES}" d="{_path(line, axes)}">'
        f"<title>{escape(line.label)}</title></path>"
        for line in lines
    ]
    return _figure(axes.svg() + "".join(drawn), description)


def scatter_axes(points: Iterable[Point], x_title: str, y_title: str) -> Axes:
    """Axes that hold all points and their error bars; shared by panels that are compared."""
    points = list(points)
    xs = [p.x + s * _known(p.x_error) for p in points for s in (-1, 1) if math.isfinite(p.x)]
    ys = [p.y + s * _known(p.y_error) for p in points for s in (-1, 1) if math.isfinite(p.y)]
    return Axes(*_padded(xs, 0.1), *_padded(ys, 0.1), x_title, y_title)


def curve_axes(lines: Iterable[Line], x_title: str, y_title: str) -> Axes:
    lines = list(lines)
    steps = [step for line in lines for step in line.steps] or [0, 1]
    values = [v for line in lines for v in line.values if math.isfinite(v)]
    high = max(max(steps), min(steps) + 1)
    return Axes(min(steps), high, *_padded(values, 0.06), x_title, y_title)


def smoothed(steps: Sequence[int], values: Sequence[float], label: str, series: int) -> Line:
    """The running mean over a tenth of the run, at no more than 120 places.

    A diffusion loss is mostly the luck of the timesteps drawn; a curve of it shows nothing else.
    """
    half = max(0, len(values) // 20)
    stride = max(1, len(values) // 120)
    places = range(0, len(values), stride)
    means = []
    for i in places:
        window = values[max(0, i - half) : i + half + 1]
        means.append(sum(window) / len(window))
    return Line(label, series, [steps[i] for i in places], means)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def number(value: float) -> str:
    """As short as an axis can have it: 0, 0.25, 300, 2.5k."""
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}".replace("-", "−")


def marker(series: int, role: str, x: float, y: float, size: float = 5.0) -> str:
    """A series' shape at (x, y): what tells series apart without colour."""
    css = f'class="mark s{series % SERIES}"'
    if role == "base":
        return f'<circle class="mark base" cx="{x}" cy="{y}" r="{size}"/>'
    if role == "real":
        d = f"M{x - size} {y}H{x + size}M{x} {y - size}V{y + size}"
        return f'<path class="mark real" d="{d}"/>'
    s = size
    paths = {
        1: f"M{x - s} {y - s}H{x + s}V{y + s}H{x - s}Z",
        2: f"M{x} {y - 1.2 * s}L{x + 1.15 * s} {y + 0.9 * s}H{x - 1.15 * s}Z",
        3: f"M{x} {y - 1.35 * s}L{x + 1.35 * s} {y}L{x} {y + 1.35 * s}L{x - 1.35 * s} {y}Z",
        4: f"M{x} {y + 1.2 * s}L{x + 1.15 * s} {y - 0.9 * s}H{x - 1.15 * s}Z",
        5: f"M{x - 1.3 * s} {y - 0.5 * s}H{x + 1.3 * s}V{y + 0.5 * s}H{x - 1.3 * s}Z",
        6: f"M{x - 0.5 * s} {y - 1.3 * s}H{x + 0.5 * s}V{y + 1.3 * s}H{x - 0.5 * s}Z",
        7: f"M{x - 1.3 * s} {y}L{x - 0.6 * s} {y - 1.1 * s}H{x + 0.6 * s}L{x + 1.3 * s} {y}"
        f"L{x + 0.6 * s} {y + 1.1 * s}H{x - 0.6 * s}Z",
    }
    shape = (series + series // SERIES) % SERIES  # the ninth series has the first's colour only
    if shape in paths:
        return f'<path {css} d="{paths[shape]}"/>'
    return f'<circle {css} cx="{x}" cy="{y}" r="{s}"/>'


def _figure(inside: str, description: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(description)}">{inside}</svg>'
    )


def _text(x: float, y: float, words: str, css: str, anchor: str, more: str = "") -> str:
    place = f'x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}"'
    return f'<text class="{css}" {place} {more}>{escape(words)}</text>'


def _mark(p: Point, axes: Axes) -> str:
    said = escape(f"{p.label}: {axes.x_title} {p.x:.3f}, {axes.y_title} {p.y:.3f}")
    drawn = marker(p.series, p.role, axes.px(p.x), axes.py(p.y))
    return f"<g>{drawn}<title>{said}</title></g>"


def _error_bars(p: Point, axes: Axes) -> str:
    x_error, y_error = _known(p.x_error), _known(p.y_error)
    across = f"M{axes.px(p.x - x_error)} {axes.py(p.y)}H{axes.px(p.x + x_error)}"
    along = f"M{axes.px(p.x)} {axes.py(p.y - y_error)}V{axes.py(p.y + y_error)}"
    css = "bar" if p.role != "run" else f"bar s{p.series % SERIES}"
    return f'<path class="{css}" d="{across}{along}"/>'


def _names(points: Sequence[Point], axes: Axes) -> list[str]:
    """Each name where it hides least: beside its mark, or further out at the end of a line."""
    marks = [_around(axes.px(p.x), axes.py(p.y), 6) for p in points]
    bars = [box for p in points for box in _bar_boxes(p, axes)]
    taken: list[Box] = []
    drawn = []
    for p in points:
        x, y, width = axes.px(p.x), axes.py(p.y), LETTER * len(p.label)
        best, least = (0.0, 0.0, 0.0, 0.0), math.inf
        for reach in (9, 14, 22, 32, 44, 58):
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
                left = x + dx * reach - (width if dx < 0 else width / 2 if dx == 0 else 0)
                top = y + dy * reach - 6
                box = (left, top, left + width, top + 12)
                outside = left < LEFT or box[2] > WIDTH or top < 0 or box[3] > HEIGHT - BOTTOM
                cost = 3 * sum(_overlap(box, other) for other in marks)
                cost += 4 * sum(_overlap(box, other) for other in taken)
                cost += 0.6 * sum(_overlap(box, other) for other in bars)
                cost += 0.9 * reach + 1e4 * outside
                if cost < least:
                    best, least = box, cost
        taken.append(best)
        drawn.append(_leader(x, y, best))
        css = "name" if p.role == "run" else "name quiet"
        drawn.append(_text(best[0], best[3] - 2.5, p.label, css, "start"))
    return drawn


def _leader(x: float, y: float, box: Box) -> str:
    """A thin line from a mark to its name, where the name is not right beside it."""
    to_x, to_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    if math.hypot(to_x - x, to_y - y) < 13:
        return ""
    return f'<path class="leader" d="M{x} {y}L{round(to_x, 1)} {round(to_y, 1)}"/>'


def _around(x: float, y: float, reach: float) -> Box:
    return (x - reach, y - reach, x + reach, y + reach)


def _bar_boxes(p: Point, axes: Axes) -> list[Box]:
    x, y, x_error, y_error = axes.px(p.x), axes.py(p.y), _known(p.x_error), _known(p.y_error)
    return [
        (axes.px(p.x - x_error), y - 1.5, axes.px(p.x + x_error), y + 1.5),
        (x - 1.5, axes.py(p.y + y_error), x + 1.5, axes.py(p.y - y_error)),
    ]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _path(line: Line, axes: Axes) -> str:
    """The line with a gap wherever the value is not finite."""
    path, pen = [], "M"
    for step, value in zip(line.steps, line.values, strict=True):
        if math.isfinite(value):
            path.append(f"{pen}{axes.px(step)} {axes.py(value)}")
        pen = "L" if math.isfinite(value) else "M"
    return "".join(path)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    space = (high - low) * share or max(abs(high), 1.0) * share
    return low - space, high + space


def _known(error: float) -> float:
    return error if math.isfinite(error) else 0.0
