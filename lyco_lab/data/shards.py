"""Rows of tensors on disk, each found by a key that says all it was made from.

    FOLDER/HASH.safetensors    n rows, some hundred: for each name a tensor (n, ...), the rows' keys
                               (n, 16) and a checksum of each

A file is written under another name and renamed, so a kill leaves none half-written. Keys are
digests: what a row was made from cannot change without its key. Rows are read from memory-mapped
files and copied, so that memory stays flat; every reading checks the row's sum.
"""

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lyco_lab.files import atomic

KEY_BYTES = 16
OPEN = 8  # files mapped at once: their pages count as memory of the process
KEYS, SUMS = "_keys", "_sums"
DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I64": np.int64, "I32": np.int32}

Rows = Mapping[str, NDArray[Any]]


class Damaged(Exception):
    """A row that is not what was written."""

    def __init__(self, shard: int) -> None:
        super().__init__(f"shard {shard}")
        self.shard = shard


def key(*parts: object) -> bytes:
    """A digest of what a row is made from."""
    text = json.dumps([part.hex() if isinstance(part, bytes) else part for part in parts])
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()


class Keys:
    """Keys that have a beginning in common: `Keys(*parts)(more)`, in a microsecond."""

    def __init__(self, *parts: object) -> None:
        self._common = hashlib.blake2b(key(*parts), digest_size=KEY_BYTES)

    def __call__(self, more: bytes) -> bytes:
        found = self._common.copy()
        found.update(more)
        return found.digest()


@dataclass(frozen=True)
class _Header:
    offsets: dict[str, int]  # in the file
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, type]
    size: int  # of the whole file

    @property
    def names(self) -> list[str]:
        return sorted(name for name in self.offsets if name not in (KEYS, SUMS))

    def array(self, data: Any, name: str, rows: slice | None = None) -> NDArray[Any]:
        shape, dtype = self.shapes[name], np.dtype(self.dtypes[name])
        count, size = shape[0], int(np.prod(shape[1:], dtype=np.int64))
        first, stop, _ = (rows or slice(None)).indices(count)
        found = np.frombuffer(
            data, dtype, (stop - first) * size, self.offsets[name] + first * size * dtype.itemsize
        )
        return found.reshape(stop - first, *shape[1:])


@dataclass
class Shards:
    """All rows in a folder. Opening it reads headers and keys; `damaged` files are set aside."""

    folder: Path
    damaged: int = 0
    _files: list[Path | None] = field(default_factory=list)
    _headers: list[_Header | None] = field(default_factory=list)
    _maps: OrderedDict[int, mmap.mmap] = field(default_factory=OrderedDict)
    _places: dict[bytes, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in sorted(self.folder.glob("*.safetensors")):
            self._add(file)

    def _add(self, file: Path) -> None:
        try:
            header, keys = _open(file)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            file.unlink(missing_ok=True)
            self.damaged += 1
            return
        self._files.append(file)
        self._headers.append(header)
        shard = len(self._files) - 1
        for row in range(len(keys) // KEY_BYTES):
            self._places[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = (shard, row)

    def places(self, keys: Sequence[bytes]) -> NDArray[np.int32]:
        """(N, 2): shard and row of each key, -1 where there is none."""
        missing = (-1, -1)
        found = [self._places.get(one, missing) for one in keys]
        return np.array(found, np.int32).reshape(-1, 2)

    def row(self, place: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        """A copy of a row's tensors, as they were written; else `Damaged`."""
        shard, row = int(place[0]), int(place[1])
        header = self._headers[shard]
        if header is None:
            raise Damaged(shard)
        data = self._map(shard)
        one = slice(row, row + 1)
        found = {name: header.array(data, name, one)[0].copy() for name in header.names}
        if _sum(found) != int(header.array(data, SUMS, one)[0]):
            raise Damaged(shard)
        return found

    def column(self, shard: int, name: str) -> NDArray[Any]:
        """One tensor of all rows of a file, unchecked."""
        header = self._headers[shard]
        assert header is not None
        return header.array(self._map(shard), name).copy()

    def keys(self, shard: int) -> list[bytes]:
        return [one for one, place in self._places.items() if place[0] == shard]

    def write(self, keys: Sequence[bytes], tensors: Rows) -> None:
        """Add rows."""
        sums = [
            _sum({name: column[i] for name, column in tensors.items()}) for i in range(len(keys))
        ]
        content = {name: np.ascontiguousarray(column) for name, column in tensors.items()}
        content[KEYS] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        content[SUMS] = np.array(sums, np.int64)
        name = hashlib.blake2b(b"".join(keys), digest_size=KEY_BYTES).hexdigest()
        file = self.folder / f"{name}.safetensors"
        with atomic(file) as temporary:
            save_file(content, temporary)
        self._add(file)

    def discard(self, shard: int) -> list[bytes]:
        """Delete a damaged file; the keys of the rows that it held, in their order."""
        keys = self.keys(shard)
        file = self._files[shard]
        if file is not None:
            file.unlink(missing_ok=True)
            self.damaged += 1
        self._files[shard] = self._headers[shard] = None
        self._maps.pop(shard, None)
        for one in keys:
            del self._places[one]
        return keys

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            file, header = self._files[shard], self._headers[shard]
            if file is None or header is None:
                raise Damaged(shard)
            try:
                with file.open("rb") as opened:
                    found = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):
                raise Damaged(shard) from None
            if len(found) != header.size:
                raise Damaged(shard)
            self._maps[shard] = found
            if len(self._maps) > OPEN:
                self._maps.popitem(last=False)
        self._maps.move_to_end(shard)
        return self._maps[shard]


def _sum(row: Rows) -> int:
    found = 0
    for name in sorted(row):
        found = zlib.crc32(np.ascontiguousarray(row[name]).reshape(-1).view(np.uint8).data, found)
    return found


def _open(file: Path) -> tuple[_Header, bytes]:
    """What a file holds and where, and its keys; `ValueError` if it cannot be so."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > size:
            raise ValueError("cut short")
        content: dict[str, Any] = json.loads(opened.read(length))
        start = 8 + length
        content.pop("__metadata__", None)
        header = _Header(
            {name: start + spec["data_offsets"][0] for name, spec in content.items()},
            {name: tuple(spec["shape"]) for name, spec in content.items()},
            {name: DTYPES[spec["dtype"]] for name, spec in content.items()},
            start + max(spec["data_offsets"][1] for spec in content.values()),
        )
        if header.size != size:
            raise ValueError("cut short")
        rows = {shape[0] for shape in header.shapes.values()}
        if len(rows) != 1:
            raise ValueError("rows do not agree")
        opened.seek(header.offsets[KEYS])
        keys = opened.read(rows.pop() * KEY_BYTES)
    return header, keys
