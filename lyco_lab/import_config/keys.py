"""The keys of a training TOML as they are used up, and what becomes of each.

Every key ends in one of three ways: it *is set* in the study, under our name; it is *left*, with
the reason; or it is *idle*, as it asks for nothing that a study would have to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lyco_lab.errors import UserError
from lyco_lab.settings import shown

DEFAULT = "their default"
MOST = 1e30  # of any number; settings have ranges of their own


@dataclass
class Keys:
    """`values` by key; `used` grows as they are asked for."""

    path: Path
    values: Mapping[str, Any]
    used: set[str] = field(default_factory=set)
    settings: dict[str, tuple[Any, str]] = field(default_factory=dict)  # ours -> value, their key
    left: dict[str, str] = field(default_factory=dict)  # their key -> why
    idle: dict[str, str] = field(default_factory=dict)

    def has(self, key: str) -> bool:
        return self.values.get(key) not in (None, "")

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number; text that spells one is one as well, as their command line has it."""
        found = self._take(key, default)
        if isinstance(found, str):
            try:
                return float(found)
            except ValueError:
                self._refuse(key, found, "a number")
        wrong = isinstance(found, bool) or not isinstance(found, int | float | None)
        if wrong or (found is not None and not abs(found) < MOST):  # nor not a number
            self._refuse(key, found, "a number")
        return found

    def whole(self, key: str, default: int | None = None) -> int | None:
        found = self.number(key, default)
        if found is not None and found != int(found):
            self._refuse(key, found, "a whole number")
        return None if found is None else int(found)

    def flag(self, key: str) -> bool:
        found = self._take(key, False)
        if not isinstance(found, bool):
            self._refuse(key, found, "true or false")
        return bool(found)

    def text(self, key: str, default: str | None = None) -> str | None:
        found = self._take(key, default)
        if not isinstance(found, str | None):
            self._refuse(key, found, "text")
        return found

    def any(self, key: str) -> Any:
        return self._take(key, None)

    def pairs(self, key: str) -> dict[str, str]:
        """["a=1", "b=2"] -> {"a": "1", "b": "2"}; one text with blanks between is as good."""
        found = self._take(key, [])
        listed = found.split() if isinstance(found, str) else found
        if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
            self._refuse(key, found, 'a list as ["name=value"]')
        pairs: dict[str, str] = {}
        for word in listed:
            name, equals, value = word.partition("=")
            if not equals:
                self._refuse(key, word, "name=value")
            if name.strip() in pairs:
                raise UserError(f"{self.path}: {key} gives {name.strip()!r} twice")
            pairs[name.strip()] = value.strip()
        return pairs

    def set(self, ours: str, value: Any, theirs: str) -> None:
        self.settings[ours] = (value, theirs if self.has(theirs.split()[0]) else DEFAULT)

    def leave(self, key: str, why: str) -> None:
        self.used.add(key.split()[0])
        self.left[key] = why

    def needless(self, key: str, why: str) -> None:
        self.used.add(key.split()[0])
        self.idle[key] = why

    def _take(self, key: str, default: Any) -> Any:
        self.used.add(key)
        return self.values[key] if self.has(key) else default

    def _refuse(self, key: str, value: object, needed: str) -> None:
        raise UserError(f"{self.path}: {key} is {shown(value)}, needs {needed}")
