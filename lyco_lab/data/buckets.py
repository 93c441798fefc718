"""What size each image is trained at, and how it gets there.

Buckets are the sizes (w, h) with both sides multiples of a step between a smallest and a largest,
and w h <= area, of which either side is the largest that the other allows. An image goes to the
bucket whose aspect is nearest,

    argmin |log(w / h) - log(W / H)|        of those with w <= W and h <= H, if not to be enlarged

which is also the one that shows the largest share of it, min(r / R, R / r) of aspects r and R. Of
equals the larger wins, then the wider. Without buckets all images have one size.

The image is resized by one factor, max(w / W, h / H), so that it covers the bucket, each side
rounded to whole pixels; the rest is cut off, as much on either side of the middle. Without
enlarging, the factor is at most 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lyco_lab.errors import UserError

SIDE = 8  # the VAEs of all families halve three times


class Fit(NamedTuple):
    """How an image becomes its bucket's: resize to `resized`, keep the box at `corner`."""

    resized: tuple[int, int]  # width, height
    corner: tuple[int, int]  # left, top, where the middle is kept
    size: tuple[int, int]  # width, height

    def seen(self, flip: bool) -> tuple[int, int]:
        """The corner, if the image had been mirrored before it was cut."""
        left, top = self.corner
        return (self.resized[0] - self.size[0] - left if flip else left), top


@dataclass(frozen=True)
class Sizing:
    """`buckets`: smallest side, largest side and step; None: all images are width x height."""

    width: int
    height: int
    buckets: tuple[int, int, int] | None = None
    upscale: bool = False

    def __post_init__(self) -> None:
        step = SIDE if self.buckets is None else self.buckets[2]
        if step < SIDE or step % SIDE:
            raise UserError(f"the step of buckets is {step}, needs a multiple of {SIDE} pixels")
        if self.buckets is None:
            for side in (self.width, self.height):
                if side < SIDE or side % SIDE:
                    raise UserError(
                        f"images of {self.width} x {self.height} pixels are asked for, needs "
                        f"multiples of {SIDE}"
                    )
            return
        least, most, _ = self.buckets
        if not step <= least <= most or least % step or most % step:
            raise UserError(
                f"buckets are {list(self.buckets)}, needs [smallest, largest, step] with both "
                "sides multiples of the step"
            )
        if least**2 > self.area:
            raise UserError(
                f"the smallest bucket, {least} x {least}, has more pixels than {self.width} x "
                f"{self.height}: needs a smaller first number in {list(self.buckets)}"
            )

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """All sizes (width, height) that an image large enough may get."""
        if self.buckets is None:
            return [(self.width, self.height)]
        return list(_table(self.area, *self.buckets, self.buckets[1], self.buckets[1]))

    def assign(self, width_N: NDArray[np.int32], height_N: NDArray[np.int32]) -> NDArray[np.int32]:
        """Sizes (N, 2), width and height, of images; 0 where an image is too small for any."""
        found = np.zeros((len(width_N), 2), np.int32)
        shapes, place_N = np.unique(np.stack([width_N, height_N], 1), axis=0, return_inverse=True)
        chosen = np.zeros_like(shapes)
        for i, (width, height) in enumerate(shapes.tolist()):
            chosen[i] = self.one(width, height) or (0, 0)
        found[:] = chosen[place_N.reshape(-1)]
        return found

    def one(self, width: int, height: int) -> tuple[int, int] | None:
        """The size of an image; None where it is too small for any."""
        if self.buckets is None:
            small = width < self.width or height < self.height
            return None if small and not self.upscale else (self.width, self.height)
        most = self.buckets[1]
        within = (most, most) if self.upscale else (min(width, most), min(height, most))
        return nearest(_table(self.area, *self.buckets, *within), width, height)


def nearest(sizes: Sequence[tuple[int, int]], width: int, height: int) -> tuple[int, int] | None:
    """Of some sizes the one of which the image shows most."""
    aspect = math.log(width / height)
    return min(
        sizes,
        # Rounded, as a size and its mirror image are equally near to a square.
        key=lambda s: (round(abs(math.log(s[0] / s[1]) - aspect), 9), -s[0] * s[1], -s[0]),
        default=None,
    )


@lru_cache(maxsize=4096)
def _table(
    area: int, least: int, most: int, step: int, width: int, height: int
) -> tuple[tuple[int, int], ...]:
    """The sizes within width x height of which either side is the largest the other allows."""

    def longest(side: int, limit: int) -> int:
        return min(area // side, limit) // step * step

    wide = {(w, longest(w, height)) for w in range(least, width + 1, step)}
    high = {(longest(h, width), h) for h in range(least, height + 1, step)}
    return tuple(sorted((w, h) for w, h in wide | high if w >= least and h >= least))


def fit(width: int, height: int, size: tuple[int, int]) -> Fit:
    """How an image of width x height becomes one of `size`."""
    w, h = size
    # By cross multiplication, since a quotient may round a side below the bucket's.
    if w * height >= h * width:
        resized = (w, max(h, (2 * height * w + width) // (2 * width)))
    else:
        resized = (max(w, (2 * width * h + height) // (2 * height)), h)
    return Fit(resized, ((resized[0] - w) // 2, (resized[1] - h) // 2), size)


def shown(width: int, height: int, size: tuple[int, int]) -> float:
    """The share of the image that is left after it was cut to `size`."""
    one, other = width * size[1], height * size[0]
    return min(one, other) / max(one, other)
