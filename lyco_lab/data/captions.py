"""Captions: how they are read, and how each showing of an image draws its own from them.

A caption is a list of tags divided by a separator. A draw, in this order:

    trigger        put in front where a caption lacks it, if the rule says so
    tag dropout    each tag after the first `keep_tags` is left out with this probability
    shuffle        the tags after the first `keep_tags` change places
    prefix, suffix around all of it, always, with a blank between where neither has one

The tag that holds the trigger is neither moved nor dropped. What is drawn depends on the seed, the
step and the place in the batch alone, and is never kept: a cache of text states holds whole
captions only, so that no dropout is baked into it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator

from lyco_lab.data.headers import Unusable
from lyco_lab.errors import UserError

_LINE_END = re.compile(r"\r\n|\r|\n")  # those that Python's text files have
CLOSING = ",.;:!?)"
LONGEST = 2**16  # bytes; no caption is longer, but a file of something else may be


def read(path: Path) -> str:
    """All of a text file, from its first character; `Unusable` if it holds no caption."""
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
    except OSError as error:
        raise Unusable(f"caption not readable: {path.name}: {error.strerror}") from None
    if len(data) > LONGEST:
        raise Unusable(f"caption too long: {path.name} has more than {LONGEST} bytes")
    try:
        text = data.decode("utf-8-sig")  # editors on Windows put a mark in front
    except UnicodeDecodeError as error:
        raise Unusable(f"caption not UTF-8: {path.name}, at byte {error.start}") from None
    if "\0" in text:
        raise Unusable(f"caption not UTF-8: {path.name} holds zero bytes")
    if not text.strip():
        raise Unusable(f"empty caption: {path.name}")
    return text.rstrip()


def chosen(text: str, lines: str, name: str) -> str:
    """The caption in a file's text: all of it, or its first line, as sd-scripts has it."""
    caption = (_LINE_END.split(text, maxsplit=1)[0] if lines == "first" else text).strip()
    if not caption:
        raise Unusable(f"empty caption: the first line of {name} is blank")
    return caption


def several_lines(text: str) -> bool:
    return bool(_LINE_END.search(text.strip()))


@dataclass(frozen=True)
class Captions:
    """How the captions of a source are drawn. `dropout` None: as training says."""

    shuffle: bool = False
    keep_tags: int = 0
    separator: str = ","
    tag_dropout: float = 0.0
    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    dropout: float | None = None

    def __post_init__(self) -> None:
        if not self.separator.strip():
            raise UserError(
                f"the separator of tags is {self.separator!r}, needs one that is not blank"
            )

    @property
    def drawn(self) -> bool:
        """Whether two draws may differ, so that their text states cannot be kept."""
        return self.shuffle or self.tag_dropout > 0

    def draw(self, caption: str, rng: Generator | None = None) -> str:
        """One draw; without `rng` the whole caption in its own order."""
        if self.trigger and not says(caption, self.trigger):
            caption = f"{self.trigger} {caption}".strip()
        if self.drawn and rng is not None:
            caption = self._shuffled(caption, rng)
        return joined(joined(self.prefix, caption), self.suffix)

    def _shuffled(self, caption: str, rng: Generator) -> str:
        tags = [tag.strip() for tag in caption.split(self.separator)]
        fixed = [
            i < self.keep_tags or bool(self.trigger and says(tag, self.trigger))
            for i, tag in enumerate(tags)
        ]
        # The same number of draws whatever the settings: each of them moves only what it is for.
        dropped = rng.random(len(tags)) < self.tag_dropout
        order = rng.permutation(len(tags))
        loose = [i for i in (order if self.shuffle else range(len(tags))) if not fixed[i]]
        places = iter(loose)
        shown = [i if fixed[i] else next(places) for i in range(len(tags))]
        left = [tags[i] for i in shown if fixed[i] or not dropped[i]]
        return f"{self.separator} ".join(left)


def joined(before: str, after: str) -> str:
    """Two texts as one, apart by a blank unless one has it already or `after` is punctuation."""
    together = not before or not after or before[-1].isspace() or after[0].isspace()
    return before + ("" if together or after[0] in CLOSING else " ") + after


def says(caption: str, trigger: str) -> bool:
    """Whether the trigger stands in the caption as words of its own."""
    padded = f" {_words(caption)} "
    return f" {_words(trigger)} " in padded


def _words(text: str) -> str:
    return " ".join("".join(c if c.isalnum() or c in "_-'" else " " for c in text.lower()).split())


def rng(seed: int) -> Generator:
    return np.random.Generator(np.random.PCG64(seed))
