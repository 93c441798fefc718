"""The project's theorems, one per file, each with a symbolic check. `python -m theory` runs all.

A theorem's docstring states and proves it. Its `identities()` yields the equalities that the proof
rests on, each as a difference in exact symbols, which must be zero. A module whose name starts
with an underscore holds what several theorems share. Existing is registering: a new file here is
found, whatever folder it is in.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import sympy as sp


@dataclass(frozen=True)
class Identity:
    """Left side minus right side of a claimed equality."""

    claim: str
    difference: sp.Expr | sp.MatrixBase

    def holds(self) -> bool:
        return is_zero(self.difference)


def is_zero(difference: sp.Expr | sp.MatrixBase) -> bool:
    """Whether `difference` (every entry of it) reduces to zero."""
    entries = difference if isinstance(difference, sp.MatrixBase) else [difference]
    return all(reduced(entry) == 0 for entry in entries)


def reduced(expression: sp.Expr) -> sp.Expr:
    """One factored fraction, with factored radicands: zero if `expression` is zero.

    An equality that this form does not see through is reported as not holding, never the reverse.
    """

    def is_root(e: sp.Expr) -> bool:
        return bool(e.is_Pow and e.exp.is_Rational and not e.exp.is_Integer)

    # sqrt(x / s**2 + y / s**2) becomes sqrt(x + y) / s only once its radicand is factored.
    expression = sp.sympify(expression).replace(
        is_root, lambda root: sp.Pow(sp.factor(root.base), root.exp)
    )
    return sp.factor(sp.together(expression))


def theorems() -> Iterator[tuple[str, ModuleType]]:
    """Every theorem file, with its path below theory/."""
    for found in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
        parts = found.name.split(".")
        if found.ispkg or any(part.startswith("_") for part in parts):
            continue
        module = importlib.import_module(found.name)
        if not hasattr(module, "identities"):
            raise TypeError(
                f"{found.name} proves nothing: a file in theory/ needs identities(), "
                "or a name that starts with an underscore"
            )
        yield "/".join(parts[1:]) + ".py", module
