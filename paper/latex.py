"""Write LaTeX: tables, numbers, and the words that need escaping."""

import math
from collections.abc import Sequence
from pathlib import Path

from lyco_lab.files import atomic

NOTHING = "--"
ESCAPES = {character: rf"\{character}" for character in "&%$#_{}"}


def escape(text: str) -> str:
    return "".join(ESCAPES.get(character, character) for character in text)


def number(value: float, digits: int) -> str:
    """With that many digits after the point, and thin spaces between thousands."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:,.{digits}f}".replace(",", r"\,").replace("-", r"$-$")


def tabular(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "r") -> str:
    """A table: the first column to the left, the others to the right ("r") or centred ("c")."""
    lines = [f"{' & '.join(cells)} \\\\" for cells in (head, *rows)]
    columns = "l" + align * (len(head) - 1)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}", ""])


def save(text: str, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / f"{name}.tex") as temporary:
        temporary.write_text(text)
