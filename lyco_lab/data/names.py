"""Which file names mean the same, whatever system they were written on.

macOS may decompose the accented letters of a name, and Windows does not tell upper from lower case.
Names are compared with composed letters (Unicode NFC), their suffixes in lower case.
"""

import unicodedata
from collections.abc import Iterable
from os.path import splitext


def composed(name: str) -> str:
    """A name or path with its accented letters in composed form."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def parts(name: str) -> tuple[str, str]:
    """Stem and suffix of a file name, for comparing."""
    stem, suffix = splitext(name)
    return composed(stem), suffix.lower()


def same(name: str) -> str:
    """Equal for two file names that mean the same."""
    return "".join(parts(name))


def by_sameness(names: Iterable[str]) -> dict[str, list[str]]:
    """The names as they are, by what they have in common."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(same(name), []).append(name)
    return found
