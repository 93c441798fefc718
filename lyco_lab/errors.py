"""What a user is told when something is wrong: one line, and what to do about it."""

import difflib
import signal
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right. The command line prints it on one line and exits 2.

    The message names the value given, the value needed, and where the given one came from.
    """


class Interrupted(RuntimeError):
    """A stage was asked to stop by a signal, and has saved what it needs to go on.

    The command line exits with 128 plus the signal's `number`: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, said: str, number: int = signal.SIGINT) -> None:
        super().__init__(said)
        self.number = number


def nearest(word: str, candidates: Iterable[str], least: float = 0.6) -> str:
    """' (did you mean 'x'?)' for the candidate closest to `word`, '' where none is close.

    A candidate that begins with `word` comes first, and the closest of the others after it.
    `least`: how alike two words have to be, from 0 to 1.
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    low = word.lower()
    longer = sorted((c for c in by_lower if len(low) > 2 and c.startswith(low)), key=len)
    close = difflib.get_close_matches(low, by_lower, n=1, cutoff=least)
    found = [by_lower[name] for name in dict.fromkeys([*longer[:1], *close])]
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def one_line(text: str) -> str:
    """`text` with whatever would end its line, or means nothing on a screen, written as a code."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
