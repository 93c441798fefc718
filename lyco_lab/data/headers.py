"""What an image's header says, and what cannot be trained on, without decoding a pixel.

Refused, as using it would change the picture silently: 16 bits per channel (it would be cut to 8),
CMYK (its colours mean nothing without the printer's profile), animations (which of the frames?) and
sizes that only a file made to exhaust the memory has.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
}
# What a person would call an image; a file of such a name is never passed over without a word.
OTHER_FORMATS = {
    ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".tga", ".exr",
    ".hdr", ".svg", ".ico", ".jfif", ".raw", ".dng", ".cr2", ".nef", ".arw",
}  # fmt: skip
MAX_PIXELS = 89_478_485  # a quarter of a gibibyte in RGB, where Pillow begins to warn too
MAX_BYTES = 2**29  # of a file: more than so many pixels take in any of the formats
ORIENTATION = 0x0112
TURNED = {5, 6, 7, 8}  # orientations that swap width and height
TURNING = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # PNG texts that Pillow heeds
LONGEST_KEY = max(map(len, TURNING))
PNG = b"\x89PNG\r\n\x1a\n"


class Unusable(Exception):
    """Why an image is not trained on: "kind: detail"; the kind is what reports count by."""


class Header(NamedTuple):
    """Size of the picture, turned as its file says it is to be looked at."""

    width: int
    height: int


@contextmanager
def strict() -> Iterator[None]:
    """For loops over `header`: Pillow's warnings of huge images become exceptions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def header(path: Path) -> Header:
    """The header of an image file; `Unusable` says why it is not one."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if not start:
                raise Unusable("empty file: it has no bytes")
            return _png(file, path) if start == PNG else _other(file, path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unusable(f"too many pixels: more than {MAX_PIXELS}") from None
    except UnidentifiedImageError:
        raise Unusable(f"not an image: no {', '.join(dict.fromkeys(FORMATS.values()))}") from None
    except FileNotFoundError:
        raise Unusable("gone: it vanished while the folder was read") from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise Unusable(f"damaged: {' '.join(str(error).split())}") from None


def _png(file: BinaryIO, path: Path) -> Header:
    """From its chunks, of which those of pixels are jumped over; Pillow would decode them.

    Where a text says how it is to be turned, Pillow is asked: it turns the image later.
    """
    width = height = 0
    orientation: object = 1
    texts = False
    while True:
        begin = file.read(8)
        if len(begin) < 8:
            raise Unusable("damaged: the file ends too early")
        length, kind = struct.unpack(">I4s", begin)
        if kind == b"IEND":
            break
        if kind in (b"iTXt", b"tEXt", b"zTXt"):
            said = file.read(min(length, LONGEST_KEY))
            file.seek(length - len(said) + 4, 1)
            texts = texts or said.startswith(TURNING)
            continue
        if kind not in (b"IHDR", b"acTL", b"eXIf"):
            file.seek(length + 4, 1)
            continue
        data = file.read(length)
        (checksum,) = struct.unpack(">I", file.read(4))
        if checksum != zlib.crc32(kind + data):
            raise Unusable("damaged: a checksum is wrong")
        if kind == b"IHDR":
            width, height, bits = struct.unpack(">IIB", data[:9])
            if bits == 16:
                raise Unusable("16 bits per channel: save it with 8")
        elif kind == b"acTL":
            (frames,) = struct.unpack(">I", data[:4])
            if frames > 1:
                raise Unusable(f"animated: {frames} frames")
        else:
            exif: Any = Image.Exif()
            exif.load(data)
            orientation = exif.get(ORIENTATION, 1)
    if texts and width * height <= MAX_PIXELS:
        with Image.open(path, formats=["PNG"]) as image:
            orientation = image.getexif().get(ORIENTATION, 1)
    return _checked(width, height, orientation)


def _other(file: BinaryIO, path: Path) -> Header:
    file.seek(0)
    with Image.open(file, formats=list(dict.fromkeys(FORMATS.values()))) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # a JPEG with a second picture for some displays
            raise Unusable(f"animated: {frames} frames")
        if image.mode == "CMYK":
            raise Unusable("CMYK: convert it to RGB")
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"):
            raise Unusable(f"colours of an unknown kind: {image.mode}")
        return _checked(*image.size, image.getexif().get(ORIENTATION, 1))


def _checked(width: int, height: int, orientation: object) -> Header:
    if width < 1 or height < 1:
        raise Unusable("damaged: it has no size")
    if width * height > MAX_PIXELS:
        raise Unusable(f"too many pixels: {width} x {height} is more than {MAX_PIXELS}")
    return Header(height, width) if orientation in TURNED else Header(width, height)
