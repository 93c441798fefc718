"""From a scene to a picture, and to a set of pictures that know what they show.

The world is deterministic: the same seed gives the same scenes, captions and pixels.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from lyco_lab.miniature.backgrounds import BACKGROUNDS
from lyco_lab.miniature.figures import DRAWERS
from lyco_lab.miniature.frame import CANVAS, Frame
from lyco_lab.miniature.styles import STYLES, Pixels
from lyco_lab.miniature.vocabulary import Scene, sample

CENTERS = {"left": 0.29, "center": 0.5, "right": 0.71}


def render(scene: Scene, rng: random.Random) -> Pixels:
    """The scene as 64 x 64 x 3 uint8. `rng` decides what no attribute says: sizes, moons."""
    image = BACKGROUNDS[scene["background"]](rng)
    if scene["kind"] in DRAWERS:
        draw, heights, feet = DRAWERS[scene["kind"]]
        x = CANVAS * (CENTERS[scene["position"]] + rng.uniform(-0.03, 0.03))
        unit = CANVAS * rng.uniform(*heights)
        y = CANVAS * rng.uniform(*feet)
        if scene.look.get("figurine"):
            unit, y = unit * 0.72, y - 0.04 * CANVAS
        draw(Frame(ImageDraw.Draw(image), x, y, unit), scene, rng, image)
    return STYLES[scene["style"]](image, rng)


@dataclass(frozen=True)
class Pictures:
    """Scenes and their pictures: `pixels` is (N, 64, 64, 3) uint8."""

    scenes: tuple[Scene, ...]
    pixels: Pixels

    def __len__(self) -> int:
        return len(self.scenes)


def drawn(count: int, seed: int) -> Iterator[tuple[Scene, Pixels]]:
    """`count` scenes of the pretraining world; number i depends on (seed, i) alone."""
    for i in range(count):
        rng = random.Random(f"world:{seed}:{i}")
        scene = sample(rng)
        yield scene, render(scene, rng)


def pictures(count: int, seed: int) -> Pictures:
    """The same, all at once."""
    scenes, pixels = zip(*drawn(count, seed), strict=True)
    return Pictures(scenes, np.stack(pixels))


def contact_sheet(rows: Sequence[Sequence[Pixels]], scale: int = 2, gap: int = 2) -> Image.Image:
    """Rows of pictures on one white sheet, each pixel enlarged `scale` times."""
    side = 64 + gap
    sheet = Image.new("RGB", (max(map(len, rows)) * side, len(rows) * side), (255, 255, 255))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (x * side, y * side))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
