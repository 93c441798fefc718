"""Which files of the cache beside the runs are damaged.

Whoever reads such a file notices, and makes it anew; here they are only looked at.
"""

from collections.abc import Iterator
from pathlib import Path

from lyco_lab.data import memo, shards
from lyco_lab.errors import UserError
from lyco_lab.files import PART
from lyco_lab.readers import read_sealed


def damaged(folder: Path) -> Iterator[Path]:
    """The damaged files at or below `folder`, in order."""
    for file in sorted(folder.rglob("*")):
        is_finished = file.is_file() and not any(part.startswith(PART) for part in file.parts)
        if is_finished and not _is_whole(file):
            yield file


def _is_whole(file: Path) -> bool:
    match file.suffix:
        case ".arrow":
            return memo.is_whole(file)
        case ".safetensors":
            return shards.is_whole(file)
        case ".count":
            try:
                read_sealed(file)
            except UserError:
                return False
    return True
