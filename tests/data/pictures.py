"""Folders of small images, good and bad, for the tests of data."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def image(path: Path, width=64, height=64, seed=0, mode="RGB", caption=None, **save) -> Path:
    """Write a random image, and its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = rng.integers(0, 256, (height, width, *channels), dtype=np.uint8)
    Image.fromarray(pixels, mode if mode == "CMYK" else None).save(path, **save)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def folder(path: Path, sizes=((64, 64), (64, 64), (64, 64))) -> Path:
    """Images 0.png, 1.png, … with captions."""
    for i, (width, height) in enumerate(sizes):
        image(path / f"{i}.png", width, height, seed=i, caption=f"sks dog, tag {i}, outside")
    return path


def png(width: int, height: int, *more: bytes, bits: int = 8) -> bytes:
    """A PNG whose header says what it is told, whatever its pixels are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", b""), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(form: str, width=16, height=16, mode="RGB", **save) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), **({"color": 9} if mode == "L" else {})).save(
        buffer, form, **save
    )
    return buffer.getvalue()


def animation(form: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], lossless=True)
    return buffer.getvalue()
