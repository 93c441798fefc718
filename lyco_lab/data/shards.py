"""Rows of tensors on disk, each found by a key that says all it was made from.

    FOLDER/HASH.safetensors    n rows, some hundred: for each name a tensor (n, ...), the rows' keys
                               (n, 16), a checksum of each, and one of all that is no row

A file is written under another name and renamed, so a kill leaves none half-written. Keys are
digests: what a row was made from cannot change without its key. Rows are read from memory-mapped
files and copied, so that memory stays flat; every reading checks the row's sum. Opening a file
checks names, types, shapes, keys and sums: a wrong type would give other numbers of the same bytes.
"""

import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lyco_lab.errors import UserError
from lyco_lab.files import atomic
from lyco_lab.readers import regular

KEY_BYTES = 16
OPEN = 8  # files mapped at once: their pages count as memory of the process
HEADER_BYTES = 2**20
KEYS, SUMS, CHECK = "_keys", "_sums", "check"
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


class _Spec(NamedTuple):
    """Where a tensor lies in a file, and as what."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Header:
    specs: dict[str, _Spec]
    size: int  # of the whole file

    @property
    def names(self) -> list[str]:
        return sorted(name for name in self.specs if name not in (KEYS, SUMS))

    def array(self, data: Any, name: str, rows: slice | None = None) -> NDArray[Any]:
        dtype, (count, *shape), offset = self.specs[name]
        size = math.prod(shape)
        first, stop, _ = (rows or slice(None)).indices(count)
        found = np.frombuffer(
            data, dtype, (stop - first) * size, offset + first * size * dtype.itemsize
        )
        return found.reshape(stop - first, *shape)


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
        except (OSError, ValueError, RecursionError, struct.error):
            _remove(file)
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
            save_file(content, temporary, {CHECK: _check(content, content[KEYS], content[SUMS])})
        self._add(file)

    def discard(self, shard: int) -> list[bytes]:
        """Delete a damaged file; the keys of the rows that it held, in their order."""
        keys = self.keys(shard)
        file = self._files[shard]
        if file is not None:
            _remove(file)
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


def is_whole(file: Path) -> bool:
    """Whether every row of a file is what was written; changes nothing."""
    try:
        header, keys = _open(file)
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError, RecursionError, struct.error):
        return False
    for row in range(len(keys) // KEY_BYTES):
        one = slice(row, row + 1)
        found = {name: header.array(data, name, one)[0] for name in header.names}
        if _sum(found) != int(header.array(data, SUMS, one)[0]):
            return False
    return True


def _sum(row: Rows) -> int:
    found = 0
    for name in sorted(row):
        found = zlib.crc32(np.ascontiguousarray(row[name]).reshape(-1).view(np.uint8).data, found)
    return found


def _check(tensors: Mapping[str, Any], keys: NDArray[Any], sums: NDArray[Any]) -> str:
    """A digest of all tensors' names, types and shapes, and of keys and sums."""
    what = [[name, str(one.dtype), list(one.shape)] for name, one in sorted(tensors.items())]
    h = hashlib.blake2b(json.dumps(what).encode(), digest_size=KEY_BYTES)
    h.update(keys.tobytes())
    h.update(sums.tobytes())
    return h.hexdigest()


def _spec(said: Any, start: int, size: int) -> _Spec:
    """Of what a header says of one tensor; `ValueError` unless it lies within the file."""
    match said:
        case {"dtype": str(name), "shape": [int(), *_] as shape, "data_offsets": [int(a), int(b)]}:
            if name not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError("a type or shape that is none")
            spec = _Spec(np.dtype(DTYPES[name]), tuple(shape), start + a)
            if not 0 <= a <= b <= size - start or b - a != spec.size:
                raise ValueError("offsets beyond the file")
            return spec
    raise ValueError("no tensor")


def _open(file: Path) -> tuple[_Header, bytes]:
    """What a file holds and where, and its keys; `ValueError` if it cannot be so."""
    with regular(file).open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > min(size, HEADER_BYTES):
            raise ValueError("cut short")
        content = json.loads(opened.read(length))
        if not isinstance(content, dict):
            raise ValueError("no header")
        said, start = content.pop("__metadata__", None), 8 + length
        specs = {name: _spec(one, start, size) for name, one in content.items()}
        if not {KEYS, SUMS} <= specs.keys() or len({one.shape[0] for one in specs.values()}) != 1:
            raise ValueError("rows do not agree")
        if start + sum(one.size for one in specs.values()) != size:
            raise ValueError("cut short")
        columns = {}
        for name in (KEYS, SUMS):
            spec = specs[name]
            opened.seek(spec.offset)
            columns[name] = np.frombuffer(opened.read(spec.size), spec.dtype)
        if said != {CHECK: _check(specs, columns[KEYS], columns[SUMS])}:
            raise ValueError("a checksum is wrong")
    return _Header(specs, size), columns[KEYS].tobytes()


def _remove(file: Path) -> None:
    """Delete what is no shard. Where something else has its name, say which."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{file} is no file of the cache, and cannot be deleted: {error.strerror}; remove it"
        ) from error
