"""What a setting's value has to be; errors name the key, the value and what is needed."""

import math
from collections.abc import Collection

from lyco_lab.errors import UserError, nearest
from lyco_lab.settings import shown


def need(condition: bool, key: str, value: object, needed: str) -> None:
    if not condition:
        raise UserError(f"{key} is {shown(value)}, needs {needed}")


def choose(key: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        hint = nearest(value, choices)
        raise UserError(f"{key} is {shown(value)}, needs one of {', '.join(choices)}{hint}")


def positive(key: str, value: float | None) -> None:
    need(value is None or (math.isfinite(value) and value > 0), key, value, "a finite number > 0")


def at_least(key: str, value: float | None, least: int) -> None:
    need(value is None or (math.isfinite(value) and value >= least), key, value, f">= {least}")


def goes_with(key: str, value: object, other: str, *, given: bool) -> None:
    """`value`, where there is one, would do nothing unless `other` is given."""
    if value is not None and not given:
        raise UserError(f"{key} is {shown(value)}, which does nothing without {other}")
