"""The class of images by the names of their folders: "10_cat" repeats cat ten times."""

import re
from pathlib import PurePosixPath

NUMBERED = re.compile(r"(\d+)_(.+)")


def place(path: str) -> tuple[str, str]:
    """Class and sub-class of the images in a folder, by the names on the way to it.

    The class ends with the first folder that has a number, or else is the outermost one.
    """
    parts = PurePosixPath(path).parts
    numbered = [i for i, part in enumerate(parts) if NUMBERED.fullmatch(part)]
    end = numbered[0] + 1 if numbered else 1
    names = [unnumbered(part) for part in parts]
    return "/".join(names[:end]), "/".join(names[end:])


def unnumbered(name: str) -> str:
    match = NUMBERED.fullmatch(name)
    return match[2].strip() if match else name
