"""Drawing in a figure's own units: x from its middle, y up from its feet, 1 = its height.

Pictures are drawn at 256 x 256 and averaged down to 64 x 64, which is what smooths the edges.
"""

import random

from PIL import Image, ImageDraw

SIZE = 64
CANVAS = 256

Color = tuple[int, int, int]
Point = tuple[float, float]
Fill = Color | int  # an int on a mask


class Frame:
    """Shapes on `draw`, in the units of a figure standing at (`x`, `y`) with height `unit` px."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, x: float, y: float, unit: float, mirror: int = 1
    ) -> None:
        self.draw, self.x, self.y, self.unit, self.mirror = draw, x, y, unit, mirror

    def on(self, draw: ImageDraw.ImageDraw) -> "Frame":
        return Frame(draw, self.x, self.y, self.unit, self.mirror)

    def px(self, point: Point) -> Point:
        return self.x + self.mirror * point[0] * self.unit, self.y - point[1] * self.unit

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        (ax, ay), (bx, by) = self.px((x0, y0)), self.px((x1, y1))
        return min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)

    def ellipse(self, x: float, y: float, a: float, b: float, fill: Fill) -> None:
        self.draw.ellipse(self.box(x - a, y - b, x + a, y + b), fill=fill)

    def ring(self, x: float, y: float, a: float, b: float, fill: Fill, width: float) -> None:
        self.draw.ellipse(
            self.box(x - a, y - b, x + a, y + b), outline=fill, width=round(width * self.unit)
        )

    def dome(self, x: float, y: float, a: float, b: float, fill: Fill) -> None:
        """The upper half of an ellipse."""
        self.draw.pieslice(self.box(x - a, y - b, x + a, y + b), 180, 360, fill=fill)

    def polygon(self, points: list[Point], fill: Fill) -> None:
        self.draw.polygon([self.px(p) for p in points], fill=fill)

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: Fill) -> None:
        self.draw.rectangle(self.box(x0, y0, x1, y1), fill=fill)

    def rounded(self, x0: float, y0: float, x1: float, y1: float, r: float, fill: Fill) -> None:
        self.draw.rounded_rectangle(self.box(x0, y0, x1, y1), r * self.unit, fill=fill)


def canvas(fill: Color = (255, 255, 255)) -> Image.Image:
    return Image.new("RGB", (CANVAS, CANVAS), fill)


def jitter(color: Color, rng: random.Random, amount: float = 9) -> Color:
    r, g, b = (int(min(255, max(0, v + rng.uniform(-amount, amount)))) for v in color)
    return r, g, b


def dark(color: Color, factor: float = 0.7) -> Color:
    r, g, b = (int(v * factor) for v in color)
    return r, g, b


def light(color: Color, amount: float = 0.5) -> Color:
    r, g, b = (int(v + (255 - v) * amount) for v in color)
    return r, g, b
