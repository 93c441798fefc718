"""Where images come from, and how those of one place are treated."""

from dataclasses import dataclass, field
from pathlib import Path

from lyco_lab.data.buckets import Sizing
from lyco_lab.data.captions import Captions

EXTENSIONS = (".txt", ".caption")
LINES = ("all", "first")  # of a caption file
MOST_REPEATS = 1_000_000
MASK_SUFFIX = ".mask.png"  # beside the image, of the same name
MASK_FOLDER = "mask"  # or in this folder beside it, as NAME.png
MASKS = ("alpha", "files")


@dataclass(frozen=True)
class Source:
    """One folder of images.

    `repeats` None: as its lists and the names of its folders say. `prior`: the images keep the
    model from forgetting what it knew, and are weighted and mixed in as such. `class_tokens`: the
    caption of images that have none. `masks`: None, or one of `MASKS`. `lines`: which of a caption
    file are the caption, one of `LINES`.
    """

    folder: Path
    repeats: int | None = None
    prior: bool = False
    recursive: bool = True
    numbered: bool = True  # whether a folder's name N_CONCEPT says its repeats
    extensions: tuple[str, ...] = EXTENSIONS
    class_tokens: str = ""
    captions: Captions = field(default_factory=Captions)
    needs_trigger: bool = False  # whether each caption has to hold the trigger already
    sizing: Sizing | None = None  # None: the data's
    flip: bool = False
    masks: str | None = None
    lines: str = field(default="all", repr=False)  # the captions themselves tell datasets apart
