"""What is asked of the concepts of a folder that holds several.

    concepts:
      - {names: ["*/others"], drawn: false}     # trained on, and neither drawn nor scored
      - {names: [castle], category: castle}     # its prompts say what fits a castle

A concept is called as its folder or its list says, CLASS or CLASS/SUBCLASS; capitals do not count.
Of the entries that match a concept the last one that says something holds.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from lyco_lab.config.checks import choose, need
from lyco_lab.errors import UserError

# For which there are prompts of their own (lyco_lab/generate.py).
CATEGORIES = (
    "person", "plushie", "style", "waterfall", "canal", "garden", "castle", "sculpture",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """`drawn` None: as the entries before it say, and at first true."""

    names: tuple[str, ...] = ()
    category: str | None = None
    drawn: bool | None = None

    def __post_init__(self) -> None:
        need(bool(self.names), "names of an entry of generate.concepts", self.names, "patterns")
        if self.category is not None:
            choose("category of an entry of generate.concepts", self.category, CATEGORIES)
        if self.category is None and self.drawn is None:
            raise UserError(
                f"the entry of generate.concepts for {', '.join(self.names)} says nothing of them: "
                "give drawn or category"
            )
        if self.category is not None and self.drawn is False:
            raise UserError(
                f"the entry of generate.concepts for {', '.join(self.names)} gives category "
                f"{self.category!r} to what is not drawn"
            )

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in self.names)
