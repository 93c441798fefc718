"""What a user is told when something is wrong: one line, and what to do about it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right. The command line prints it on one line and exits 2.

    The message names the value given, the value needed, and where the given one came from.
    """


class Interrupted(RuntimeError):
    """A stage was asked to stop, and has saved what it needs to go on. Exits 130."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the candidate closest to `word`, '' where none is close."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def one_line(text: str) -> str:
    """`text` with whatever would end its line, or means nothing on a screen, written as a code."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
