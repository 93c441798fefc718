"""How a scene is rendered: each `name(image, rng)` turns a 256 x 256 drawing into 64 x 64 RGB.

Textures keep to a grid of four pixels, the stride of the autoencoder: a period that does not
divide it cannot be encoded.
"""

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from lyco_lab.miniature.frame import CANVAS, SIZE

Pixels = NDArray[np.uint8]
Style = Callable[[Image.Image, random.Random], Pixels]

_YY, _XX = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
_DOTS = np.clip(1.9 - np.hypot(_XX % 4 - 1.5, _YY % 4 - 1.5), 0, 1)[..., None]
_HATCH = (((_XX + _YY) % 4) < 2).astype(np.float32)


def _down(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)).astype(np.float32)


def _u8(a: NDArray[np.float32]) -> Pixels:
    return np.clip(a + 0.5, 0, 255).astype(np.uint8)


def _spread(a: Pixels, k: int) -> NDArray[np.int16]:
    """Largest minus smallest value over (2k+1) x (2k+1) windows, by two separable passes.

    PIL's rank filters do the same a hundred times slower.
    """
    high, low = a, a
    for axis in (0, 1):
        pad = [(k, k) if i == axis else (0, 0) for i in range(3)]
        up, down = np.pad(high, pad, mode="edge"), np.pad(low, pad, mode="edge")
        n = a.shape[axis]
        views = [tuple(slice(i, i + n) if ax == axis else slice(None) for ax in range(3))
                 for i in range(2 * k + 1)]  # fmt: skip
        high = np.maximum.reduce([up[v] for v in views])
        low = np.minimum.reduce([down[v] for v in views])
    return high.astype(np.int16) - low


def _edges(image: Image.Image, k: int) -> NDArray[np.float32]:
    """Edge strength at 64 x 64, found at 128 x 128 so that thin lines survive."""
    half = np.asarray(image.resize((CANVAS // 2, CANVAS // 2), Image.Resampling.BOX))
    strength = _spread(half, k).max(2).astype(np.float32)
    return np.clip((strength - 26) / 45, 0, 1).reshape(SIZE, 2, SIZE, 2).mean((1, 3))


def flat(image: Image.Image, rng: random.Random) -> Pixels:
    return _u8(_down(image))


def ink(image: Image.Image, rng: random.Random) -> Pixels:
    """Black outlines over a pale wash of the colours."""
    wash = 255 - (255 - _down(image)) * 0.5
    return _u8(wash * (1 - 0.92 * _edges(image, 1)[..., None]))


def sketch(image: Image.Image, rng: random.Random) -> Pixels:
    """Grey pencil: lines, and hatching where it is dark. No colour is left."""
    tone = np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.BOX))
    shade = np.clip((205 - tone.astype(np.float32)) / 190, 0, 1)
    grey = 242 - 110 * _HATCH * shade - 40 * shade - 170 * _edges(image, 1)
    return _u8(np.repeat(grey[..., None], 3, axis=2))


def dots(image: Image.Image, rng: random.Random) -> Pixels:
    """Printed dots: full colour inside each, half washed out between them."""
    color = _down(image)
    return _u8(color * _DOTS + (255 - (255 - color) * 0.35) * (1 - _DOTS))


def pixel(image: Image.Image, rng: random.Random) -> Pixels:
    """Blocks of two pixels in six levels per channel, one block in two a shade darker."""
    small = np.asarray(image.resize((SIZE // 2, SIZE // 2), Image.Resampling.BOX))
    coarse = np.round(small.astype(np.float32) / 51) * 51
    checker = ((_XX[: SIZE // 2, : SIZE // 2] + _YY[: SIZE // 2, : SIZE // 2]) % 2)[..., None]
    return _u8(np.repeat(np.repeat(coarse * (1 - 0.16 * checker), 2, 0), 2, 1))


def watercolor(image: Image.Image, rng: random.Random) -> Pixels:
    """Soft and pale, on blotted paper."""
    soft = image.resize((SIZE, SIZE), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(1.0))
    a = np.asarray(soft).astype(np.float32)
    noise = np.random.default_rng(rng.randrange(1 << 30)).random((9, 9))
    blots = Image.fromarray((noise * 255).astype(np.uint8)).resize(
        (SIZE, SIZE), Image.Resampling.BICUBIC
    )
    paper = np.asarray(blots).astype(np.float32)[..., None] / 255 - 0.5
    pale = a + (255 - a) * 0.34 + paper * 56
    return _u8(pale * (1 - 0.22 * _edges(image, 2)[..., None]))


def stained(image: Image.Image, rng: random.Random) -> Pixels:
    """Stained glass: cells of one colour each, leaded in black."""
    side, n = 128, 6
    noise = np.random.default_rng(rng.randrange(1 << 30)).uniform(0.1, 0.9, (n * n, 2))
    grid = np.moveaxis(np.mgrid[0:n, 0:n], 0, -1).reshape(-1, 2)
    seeds = ((grid + noise) * side / n).astype(np.float32)
    at = np.moveaxis(np.mgrid[0:side, 0:side], 0, -1).reshape(-1, 2).astype(np.float32)
    nearest = ((seeds**2).sum(1)[None] - 2 * at @ seeds.T).argmin(1)
    a = np.asarray(image.resize((side, side), Image.Resampling.BOX)).reshape(-1, 3)
    count = np.bincount(nearest, minlength=n * n) + 1e-6
    means = np.stack([np.bincount(nearest, a[:, c], n * n) / count for c in range(3)], 1)
    out = means[nearest].reshape(side, side, 3)
    grey = out.mean(2, keepdims=True)
    out = np.clip(grey + (out - grey) * 1.6, 0, 255)
    cell = nearest.reshape(side, side)
    lead = np.zeros((side, side), bool)
    lead[1:] |= cell[1:] != cell[:-1]
    lead[:, 1:] |= cell[:, 1:] != cell[:, :-1]
    lead[:-1] |= lead[1:]
    out[lead] = 15
    return _u8(out.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3)).astype(np.float32))


def neon(image: Image.Image, rng: random.Random) -> Pixels:
    """Dark, with edges that glow in the colours they bound."""
    color, edge = _down(image), _edges(image, 2)[..., None]
    grey = color.mean(2, keepdims=True)
    vivid = np.clip(grey + (color - grey) * 2.2 + 70, 0, 255)
    glow = Image.fromarray(_u8(vivid * edge)).filter(ImageFilter.GaussianBlur(2.0))
    lit = np.array([14, 6, 34], np.float32) + vivid * edge * 0.85
    return _u8(lit + np.asarray(glow).astype(np.float32) * 0.7)


STYLES: dict[str, Style] = {
    f.__name__: f for f in (flat, ink, sketch, dots, pixel, watercolor, stained, neon)
}
