"""Reading files that others, a broken disk or an earlier version may have written.

One reader for each format. Whatever it meets, it returns checked content or raises `Damaged`, whose
message names the file and what is wrong with it; nothing is read of what is no regular file, and
nothing larger than the format's limit is taken into memory.
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lyco_lab.errors import UserError
from lyco_lab.files import DIGEST_BYTES, SEAL, SEAL_BYTES

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger(__name__)
MIB = 2**20
TEXT_BYTES = 64 * MIB  # of JSON, CSV, YAML and TOML
TABLE_BYTES = 2**32  # of Parquet and Arrow
MOST_PIXELS = 2**26  # of an image that this program wrote


class Damaged(UserError):
    """A file that is not what was written there."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}")
        self.path, self.reason = path, reason


def regular(path: Path, most_bytes: int | None = None) -> Path:
    """`path`, if a regular file of at most so many bytes is there; else a `UserError`.

    A named pipe would be waited for without end, and a device has no end.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise UserError(f"cannot read {path}: it is {kind}, and a file is needed")
    if most_bytes is not None and found.st_size > most_bytes:
        raise UserError(
            f"cannot read {path}: it has {found.st_size:,} bytes, more than the {most_bytes:,} "
            "that such a file may have"
        )
    return path


def read_bytes(path: Path, most_bytes: int = TEXT_BYTES) -> bytes:
    """The file's bytes. What has no size of its own, as in /proc, is cut off by the limit too."""
    log.debug("read %s", path)
    with _reading(path), open(regular(path, most_bytes), "rb") as file:
        content = read_at_most(file, most_bytes + 1)
    if len(content) > most_bytes:
        raise UserError(f"cannot read {path}: it has more than {most_bytes:,} bytes")
    return content


def read_at_most(file: IO[bytes], most_bytes: int) -> bytes:
    """`file.read(most_bytes)`, which would allocate that many bytes however few there are."""
    pieces = []
    while most_bytes > 0 and (piece := file.read(min(MIB, most_bytes))):
        pieces.append(piece)
        most_bytes -= len(piece)
    return b"".join(pieces)


def read_text(path: Path, most_bytes: int = TEXT_BYTES) -> str:
    """The file's text in UTF-8; a byte-order mark is no part of it."""
    content = read_bytes(path, most_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Damaged(path, f"it is no UTF-8 at byte {error.start}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise Damaged(path, f"it is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise Damaged(path, f"it holds {type(found).__name__}, and an object is needed")
    return found


def read_csv(
    path: Path, columns: tuple[str, ...] = (), most_bytes: int = TEXT_BYTES
) -> list[dict[str, str]]:
    """The rows of a CSV file, each with a cell in every column; `columns` have to be among them."""
    text = read_text(path, most_bytes)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise Damaged(path, f"it is no CSV ({error})") from error
    head = lines[0] if lines else []
    if lacking := [name for name in columns if name not in head]:
        raise Damaged(path, f"it has no column {', '.join(lacking)}")
    if twice := [name for name in dict.fromkeys(head) if head.count(name) > 1]:
        raise Damaged(path, f"it has the column {twice[0]!r} twice")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(head):
            raise Damaged(path, f"line {number} has {len(line)} cells, and its head {len(head)}")
    return [dict(zip(head, line, strict=True)) for line in lines[1:]]


def read_parquet(path: Path, columns: tuple[str, ...] = ()) -> "pd.DataFrame":
    """A table; `columns` have to be among its own."""
    import pandas as pd
    import pyarrow as pa

    content = read_bytes(path, TABLE_BYTES)
    try:
        table = pd.read_parquet(io.BytesIO(content))
    except (pa.ArrowException, OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise Damaged(path, f"it is no Parquet table ({_brief(error)})") from error
    if lacking := [name for name in columns if name not in table]:
        raise Damaged(path, f"it has no column {', '.join(lacking)}")
    return table


def read_sealed(path: Path, most_bytes: int = TEXT_BYTES) -> memoryview:
    """The bytes of a file that `files.seal` ended with their digest, without that line."""
    content = memoryview(read_bytes(path, most_bytes))
    body, line = content[:-SEAL_BYTES], bytes(content[-SEAL_BYTES:])
    if not line.startswith(SEAL):
        raise Damaged(path, "it does not end with its checksum")
    digest = hashlib.blake2b(body, digest_size=DIGEST_BYTES).hexdigest()
    if line != SEAL + digest.encode() + b"\n":
        raise Damaged(path, "its checksum is wrong")
    return body


def read_arrow(path: Path) -> "pa.Table":
    """The table in a sealed Arrow file, in memory.

    The checksum comes first: Arrow believes the lengths and offsets of what it is given, and a
    wrong one ends the process.
    """
    import pyarrow as pa

    content = read_sealed(path, TABLE_BYTES)
    try:
        with pa.ipc.open_file(pa.py_buffer(content)) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise Damaged(path, f"it is no Arrow table ({_brief(error)})") from error
    return table


def read_png(path: Path) -> "NDArray[np.uint8]":
    """An image as RGB, shape (height, width, 3), values in [0, 255]; all of it is decoded."""
    import numpy as np
    from PIL import Image

    content = read_bytes(path, 4 * MOST_PIXELS)
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Damaged(path, f"it claims {image.width} x {image.height} pixels")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise Damaged(path, f"it is no whole PNG ({_brief(error)})") from error


def read_safetensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """The tensors of a safetensors file, and its metadata."""
    import safetensors
    from safetensors import safe_open

    with _reading(path):
        try:
            with safe_open(regular(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, dict(file.metadata() or {})
        except (safetensors.SafetensorError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise Damaged(path, f"it is no safetensors file ({_brief(error)})") from error


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot read {path}: {reason}") from error
