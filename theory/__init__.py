"""The project's theorems, one per file, each with a symbolic check. `python -m theory` runs all.

A theorem's docstring states and proves it. Its `identities()` yields the equalities that the proof
rests on, each as a difference in exact symbols, which must be zero, and the counterexamples, each a
difference at exact numbers, which must not. A module whose name starts with an underscore holds
what several theorems share. Existing is registering: a new file here is found, whatever folder it
is in.
"""

import abc
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import sympy as sp
from sympy.core.evalf import PrecisionExhausted
from sympy.core.function import AppliedUndef


@dataclass(frozen=True)
class Check(abc.ABC):
    """Left side minus right side of an equality, and what is claimed of it."""

    claim: str
    difference: sp.Expr | sp.MatrixBase

    @abc.abstractmethod
    def holds(self) -> bool:
        """Whether the claim is shown to be true."""

    @abc.abstractmethod
    def verdict(self) -> str:
        """What was shown of the difference, if the claim holds."""

    def entries(self) -> list[sp.Expr]:
        one = not isinstance(self.difference, sp.MatrixBase)
        return [sp.sympify(self.difference)] if one else list(self.difference)


class Identity(Check):
    """The two sides are equal, in symbols."""

    def holds(self) -> bool:
        return is_zero(self.difference)

    def verdict(self) -> str:
        return "difference = 0"


class Counterexample(Check):
    """The two sides differ, at exact numbers: what is not exact, or not a number, shows nothing."""

    def holds(self) -> bool:
        entries = self.entries()
        return all(map(_is_exact, entries)) and any(map(_is_not_zero, entries))

    def verdict(self) -> str:
        number = next(filter(_is_not_zero, self.entries()))
        exact = str(number)
        return f"differs: {exact if len(exact) <= 16 else number.evalf(6)}"


def _is_exact(number: sp.Expr) -> bool:
    return bool(number.is_number and number.is_finite and not number.has(sp.Float))


def _is_not_zero(number: sp.Expr) -> bool:
    """Whether an exact number is not zero: by its fraction, or by digits that SymPy guarantees."""
    if number.is_Rational:
        return bool(number != 0)
    try:
        return bool(number.evalf(15, strict=True) != 0)
    except PrecisionExhausted:
        return False


def is_zero(difference: sp.Expr | sp.MatrixBase) -> bool:
    """Whether `difference` (every entry of it) reduces to zero."""
    matrix = isinstance(difference, sp.MatrixBase)
    entries = list(difference) if matrix else [sp.sympify(difference)]
    if any(map(_refuted, entries)):
        return False
    return all(reduced(entry) == 0 for entry in entries)


def _refuted(expression: sp.Expr) -> bool:
    """Whether it is not zero at some numbers, which is quickly seen where a factoring takes long.

    An undefined function may be any, so also x -> 1 / (1 + x**2).
    """
    number = expression.replace(
        lambda e: isinstance(e, AppliedUndef), lambda e: 1 / (1 + sum(x**2 for x in e.args))
    )
    at = {}
    for i, x in enumerate(sorted(number.free_symbols, key=str)):
        if x.is_negative:
            return False
        fraction = sp.Float(sp.prime(i + 1), 50) / (sp.prime(i + 1) + i + 2)
        at[x] = sp.Integer(i + 2) if x.is_integer else fraction
    found = number.xreplace(at).evalf(50)
    return bool(found.is_Float and abs(found) > 1e-10)


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
