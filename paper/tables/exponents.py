"""Table: the power of s by which each setting moves when gamma is folded away."""

from collections.abc import Sequence

from lyco_lab.gamma import POWERS
from paper import data, latex
from paper.paths import TABLES

COLUMNS = {
    "lr": "learning rate",
    "eps": r"$\epsilon$",
    "weight_decay": "weight decay",
    "grad_clip": "clipping norm",
}
NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}


def rows() -> list[list[str]]:
    def cell(powers: dict[str, int], setting: str) -> str:
        if setting not in powers:
            return latex.NOTHING
        return "$s$" if powers[setting] == 1 else f"$s^{{{powers[setting]}}}$"

    return [
        [NAMES.get(name, name), "$s$", *(cell(dict(powers), setting) for setting in COLUMNS)]
        for name, powers in POWERS.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    given = data.arguments(__doc__ or "", TABLES, argv)
    head = ["", "initial factors", *COLUMNS.values()]
    latex.save(latex.tabular(head, rows(), align="c"), given.out, "exponents")


if __name__ == "__main__":
    data.script(main)
