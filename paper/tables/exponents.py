"""Table: the power of s by which each setting moves when gamma is folded away."""

from collections.abc import Mapping, Sequence

from lyco_lab.optimizers import OPTIMIZERS
from paper import data, latex
from paper.paths import TABLES

COLUMNS = {"lr": "learning rate", "eps": r"$\epsilon$", "weight_decay": "weight decay"}
NAMES = {"adamw8bit": "AdamW, 8 bit", "schedulefree": "AdamW, schedule-free"}


def power(of: int) -> str:
    return {0: latex.NOTHING, 1: "$s$"}.get(of, f"$s^{{{of}}}$")


def others(powers: Mapping[str, int]) -> str:
    """The settings that only some optimizers have."""
    moved = [f"{latex.escape(k)}: {power(p)}" for k, p in powers.items() if k not in COLUMNS]
    return ", ".join(moved) or latex.NOTHING


def rows() -> list[list[str]]:
    found = []
    for name, cls in sorted(OPTIMIZERS.items()):
        if cls.no_gamma:
            cells = ["no exact transformation", *[latex.NOTHING] * len(COLUMNS)]
        else:
            cells = [*(power(cls.powers.get(key, 0)) for key in COLUMNS), others(cls.powers)]
        found.append([NAMES.get(name, cls.__name__), *cells])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    given = data.arguments(__doc__ or "", TABLES, argv)
    head = ["", *COLUMNS.values(), "others"]
    latex.save(latex.tabular(head, rows(), align="l"), given.out, "exponents")


if __name__ == "__main__":
    data.script(main)
