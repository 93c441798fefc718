"""An image, or its mask, as the model sees it: upright, in RGB, cut to its bucket, maybe mirrored.

A mask says how much each place of the image counts, from 0 to 1: white is all, black nothing. It
goes through the same resizing and cutting, and its value over a latent is the mean over the pixels
that the latent stands for.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lyco_lab.data.buckets import Fit, fit
from lyco_lab.data.folder import open_image, read_image, upright
from lyco_lab.errors import UserError

CELL = 8  # pixels of a latent's side


@dataclass(frozen=True)
class Picture:
    """An image ready for the VAE, and what was done to it."""

    pixels_HWC: NDArray[np.uint8]
    mask_hw: NDArray[np.uint8] | None  # per latent, 255 for 1
    corner: tuple[int, int]  # left, top of the part that was kept, of the resized, mirrored image


def read(
    file: Path,
    expected: tuple[int, int],
    size: tuple[int, int],
    *,
    flip: bool = False,
    masks: str | None = None,
    mask: Path | None = None,
    at: tuple[float, float] | None = None,
    cell: int = CELL,
) -> Picture:
    """The image in `file`, which has `expected` (width, height), cut to `size`.

    `at`: where the cut is, as shares of the room there is to the left and above; None: the middle.
    """
    image = read_image(file)
    if image.size != expected:
        raise UserError(
            f"{file} is {image.width} x {image.height} pixels, and was {expected[0]} x "
            f"{expected[1]} when the folder was read: it changed since; put it back and run the "
            "command again"
        )
    how = fit(*expected, size)
    if at is not None:
        room = (how.resized[0] - size[0], how.resized[1] - size[1])
        how = how._replace(corner=(round(at[0] * room[0]), round(at[1] * room[1])))
    pixels = np.asarray(_cut(image, how, flip))
    return Picture(pixels, _mask(file, expected, how, flip, masks, mask, cell), how.seen(flip))


def _cut(image: Image.Image, how: Fit, flip: bool) -> Image.Image:
    if image.size != how.resized:
        image = image.resize(how.resized, Image.Resampling.LANCZOS)
    left, top = how.corner
    image = image.crop((left, top, left + how.size[0], top + how.size[1]))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def _mask(
    file: Path,
    expected: tuple[int, int],
    how: Fit,
    flip: bool,
    masks: str | None,
    mask: Path | None,
    cell: int,
) -> NDArray[np.uint8] | None:
    """None where all of the image counts."""
    if masks == "alpha":
        with open_image(file) as opened:
            if not opened.has_transparency_data:
                return None
            found = upright(opened).convert("RGBA").getchannel("A")
    elif mask is not None:
        with open_image(mask) as opened:
            found = upright(opened).convert("L")
        if found.size != expected:
            raise UserError(
                f"the mask {mask} is {found.width} x {found.height} pixels, needs {expected[0]} x "
                f"{expected[1]} as {file.name}"
            )
    else:
        return None
    latent = (how.size[0] // cell, how.size[1] // cell)
    return np.asarray(_cut(found, how, flip).resize(latent, Image.Resampling.BOX))
