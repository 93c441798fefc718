"""What was learned of each file, kept under its stamp: a folder is read once, not in every run.

One row per file, in columns: of an image its size and, once it was decoded, a digest of its bytes;
of a caption its text; of either, why it cannot be used. A row counts only while the file has the
stamp it was read under. The memo only saves time: without it the same is read again. It ends with
a checksum of itself, so that a damaged one is noticed, and replaced.
"""

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lyco_lab.data.scan import UNSETTLED, Stamp
from lyco_lab.errors import UserError
from lyco_lab.files import atomic, seal
from lyco_lab.readers import TABLE_BYTES, read_arrow, read_sealed

VERSION = b"3"  # of what is learned; another one is read anew
SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("size", pa.int64()),
        ("modified_ns", pa.int64()),
        ("changed_ns", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("text", pa.string()),
        ("problem", pa.string()),
        ("digest", pa.binary()),
    ],
    metadata={b"version": VERSION},
)


NUMBERS = ("size", "modified_ns", "changed_ns", "width", "height")


class Known(NamedTuple):
    width: int = 0
    height: int = 0
    text: str = ""
    problem: str = ""  # "": none
    digest: bytes = b""  # b"": not yet decoded


@dataclass
class _Columns:
    """Rows under construction."""

    file: list[str] = field(default_factory=list)
    stamp: "array[int]" = field(default_factory=lambda: array("q"))  # three per row
    size: "array[int]" = field(default_factory=lambda: array("i"))  # width and height of each
    text: list[str] = field(default_factory=list)
    problem: list[str] = field(default_factory=list)
    digest: list[bytes] = field(default_factory=list)

    def add(self, file: str, stamp: Stamp, known: Known) -> None:
        self.file.append(file)
        self.stamp.extend(stamp)
        self.size.extend(known[:2])
        self.text.append(known.text)
        self.problem.append(known.problem)
        self.digest.append(known.digest)

    def table(self) -> Any:
        stamps = np.array(self.stamp, np.int64).reshape(-1, 3)
        sizes = np.array(self.size, np.int32).reshape(-1, 2)
        numbers = [*stamps.T, *sizes.T]
        rest = [pa.array(c, SCHEMA.field(i + 6).type) for i, c in enumerate(
            (self.text, self.problem, self.digest))]  # fmt: skip
        return pa.table([pa.array(self.file), *map(pa.array, numbers), *rest], schema=SCHEMA)


class Memo:
    """Rows of before, and those learned since; files by their full path. None: nothing is kept."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.read = 0  # files that had to be opened
        self._load()

    def _load(self) -> None:
        self._table = table = _read(self.path)
        self._rows = {file: i for i, file in enumerate(table["file"].to_pylist())}
        # Views of the columns: a number is read from them without an object for each row.
        self._numbers = [_view(table[name].to_numpy()) for name in NUMBERS]
        self._texts = [table[name].combine_chunks() for name in ("text", "problem", "digest")]
        self._has = [_view(pc.binary_length(column).to_numpy()) for column in self._texts]
        self._learned = _Columns()

    def find(self, file: str, stamp: Stamp) -> Known | None:
        """What is known of the file, if it is still the one that was read."""
        row = self._rows.get(file)
        if row is None or stamp.changed_ns == UNSETTLED:
            return None
        sizes, modified, changed, width, height = self._numbers
        if sizes[row] != stamp.size or modified[row] != stamp.modified_ns:
            return None
        if changed[row] != stamp.changed_ns:
            return None
        (text, problem, digest), has = self._texts, self._has
        return Known(
            width[row],
            height[row],
            text[row].as_py() if has[0][row] else "",
            problem[row].as_py() if has[1][row] else "",
            digest[row].as_py() if has[2][row] else b"",
        )

    def learn(self, file: str, stamp: Stamp, known: Known) -> None:
        self.read += 1
        self._learned.add(file, stamp, known)

    def save(self) -> None:
        """Write what is known, the later row of a file replacing the earlier."""
        if self.path is None or not self._learned.file:
            return
        table = pa.concat_tables([self._table, self._learned.table()]).combine_chunks()
        last = {file: i for i, file in enumerate(table["file"].to_pylist())}
        if len(last) < len(table):
            table = table.take(pa.array(sorted(last.values())))
        with atomic(self.path) as temporary:
            with (
                pa.OSFile(str(temporary), "wb") as file,
                pa.ipc.new_file(file, SCHEMA) as writer,
            ):
                writer.write_table(table, max_chunksize=2**16)
            seal(temporary)
        self._load()


def is_whole(file: Path) -> bool:
    """Whether the file is a memo as it was written, of whichever version."""
    try:
        read_sealed(file, TABLE_BYTES)
    except UserError:
        return False
    return True


def _view(column: Any) -> memoryview:
    whole: Any = np.ascontiguousarray(column)
    return memoryview(whole)


def _read(path: Path | None) -> Any:
    """The rows of a memo; of one that is damaged or of another version, none."""
    if path is None or not path.exists():
        return SCHEMA.empty_table()
    try:
        table = read_arrow(path)
    except UserError as error:
        print(f"{error}; every image and caption is read anew")
        return SCHEMA.empty_table()
    known = table.schema.equals(SCHEMA, check_metadata=True)
    return table.combine_chunks() if known else SCHEMA.empty_table()
