"""What the theorems about optimisers share: the meaning of equivariance, and how it is solved for.

An optimiser is a map (state; settings) -> state, where the state holds the factors theta, the
gradient just measured, and whatever else the rule remembers. Folding gamma away multiplies theta by
s and, by theory/gradient_identity.py, the gradient by 1/s. The optimiser is *equivariant* if its
step commutes with that scaling once the settings h move by powers of s,

    step(s**w x; s**p h)  =  s**w step(x; h)      for all s > 0, states x and settings h,   (1)

where each entry of the state has a weight w of its own (theta: 1; the gradient and its running
mean: -1; the mean of its squares: -2; a count of steps: 0), and memory that starts at a setting,
or at theta, starts at the moved one.

Which powers are possible follows from (1): its derivative by s at s = 1 is, for every entry y of
the result, Euler's identity

    sum_h p_h h dy/dh  +  sum_x w_x x dy/dx  =  w_y y.                                      (2)

This is linear in the powers p of the settings and w of the memory, which are unknown alike, and
must hold at every state. `solve` asks it of a few, in 80 digits, whose solution in whole numbers is
the only one; it is compared with the claim, and the claim is put back into (1), in symbols.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import sympy as sp

from theory import Identity

Values = Mapping[str, sp.Expr]

s = sp.Symbol("s", positive=True)


@dataclass(frozen=True)
class Rule:
    """An update rule in symbols; where it branches, one rule may stand for one branch."""

    name: str
    step: Callable[[Values, Values], Values]
    state: Values  # a value is a symbol, a matrix of them, or a number
    weights: Mapping[str, sp.Expr | int]  # entry of the state -> its power of s
    hyper: Values
    powers: Mapping[str, int]  # claim: setting -> the power of s by which it moves
    # Memory that does not start at zero: at a setting, at "theta", at a number, or (None) missing.
    start: Mapping[str, str | int | None] = field(default_factory=dict)

    def residual(self, powers: Mapping[str, int]) -> dict[str, sp.Expr]:
        """Left minus right side of (1), for all that the step returns."""
        here = self.step(self.state, self.hyper)
        there = self.step(scaled(self.state, self.weights), scaled(self.hyper, powers))
        return {name: _difference(there[name], here[name], self.weights[name]) for name in here}

    def is_equivariant(self) -> Iterator[Identity]:
        for name, left in self.residual(self.powers).items():
            yield Identity(f"{self.name}: {name} scales by s**{self.weights[name]}", left)
        for name, left in self.unlike_start(self.powers).items():
            yield Identity(f"{self.name}: {name} starts scaled by s**{self.weights[name]}", left)

    def unlike_start(self, powers: Mapping[str, int]) -> dict[str, sp.Expr]:
        """The power of s of what is remembered, less that of what it starts at."""
        given = {"theta": 1, **dict.fromkeys(self.hyper, 0), **powers}
        return {
            name: self.weights[name] - sp.Integer(given[first] if isinstance(first, str) else 0)
            for name, first in self.start.items()
            if first is not None
        }

    def beginning(self, theta: sp.Expr, hyper: Values) -> dict[str, sp.Expr]:
        """The state before the first step, but for the gradient."""
        state = {"theta": theta}
        for name, value in self.state.items():
            first = self.start.get(name, 0)
            if name in ("theta", "grad") or first is None:
                continue
            if isinstance(first, str):
                state[name] = theta if first == "theta" else hyper[first]
            else:
                state[name] = sp.zeros(*value.shape) if is_matrix(value) else sp.Integer(first)
        return state

    def equations(self, k: int) -> Iterator[tuple[dict[str, sp.Expr], sp.Expr]]:
        """(2) at the k-th state, for every entry of the result.

        What multiplies each unknown power (of settings, and of what is remembered), and the right
        side. A derivative is a difference of steps in 80 digits, some 30 of which are right.
        """
        own = {x for value in self.hyper.values() for x in entries(value)}
        growing = {name: entries(value) for name, value in self.hyper.items()}
        for name, value in self.state.items():
            growing[name] = [x for x in entries(value) if x.is_Symbol and x not in own]
        numbers = sample({x for symbols in growing.values() for x in symbols}, k)

        def results(name: str = "") -> dict[str, list[sp.Expr]]:
            """What the step returns, once this has grown by a small part of itself."""
            at = numbers | {x: numbers[x] * (1 + SMALL) for x in growing.get(name, ())}
            state, hyper = (
                {name: sp.sympify(value).xreplace(at) for name, value in values.items()}
                for values in (self.state, self.hyper)
            )
            return {name: entries(value) for name, value in self.step(state, hyper).items()}

        here = results()
        grown = {name: results(name) for name in growing}
        # Known are the powers of what is given, and one that is itself a setting.
        known = {
            name: sp.sympify(weight).xreplace(numbers)
            for name, weight in self.weights.items()
            if name in ("theta", "grad") or name not in here or not sp.sympify(weight).is_number
        }
        for name, values in here.items():
            for i, y in enumerate(values):
                row = {x: (other[name][i] - y) / SMALL for x, other in grown.items()}
                row[name] = row.get(name, 0) - y
                right = -sum(known[x] * row.pop(x) for x in known if x in row)
                yield row, right
        for name, first in self.start.items():  # at the start they are one
            if first == "theta":
                yield {name: sp.Integer(1)}, sp.Integer(1)
            elif isinstance(first, str):
                yield {name: sp.Integer(1), first: sp.Integer(-1)}, sp.Integer(0)
            elif first is not None:
                yield {name: sp.Integer(1)}, sp.Integer(0)


def proved(*rules: Rule, kept: Sequence[str] = ()) -> Iterator[Identity]:
    """The theorem for one optimiser, whose branches have the same settings."""
    yield from derived(*rules, kept=kept)
    for rule in rules:
        yield from rule.is_equivariant()


def derived(*rules: Rule, kept: Sequence[str] = ()) -> Iterator[Identity]:
    """That the powers claimed are those that follow from the step, if some settings are kept."""
    title, hyper, powers = rules[0].name.split(",")[0], rules[0].hyper, rules[0].powers
    solution = solve(*rules, kept=kept)
    for name, power in solution.items():
        symbol = sp.Symbol(name) if is_matrix(hyper[name]) else hyper[name]
        verb = f"{symbol}' = {s**power * symbol}" if power else f"{symbol} stays"
        yield Identity(f"{title}: {verb}, as claimed", sp.Integer(power - powers.get(name, 0)))
    for name in powers:
        if name not in solution:
            raise ArithmeticError(f"{title}: no power of {name} follows from the step")


def solve(*rules: Rule, kept: Sequence[str] = ()) -> dict[str, int]:
    """The powers of the settings that follow from (2); an error where it has no solution.

    A setting of which no power follows is left out, such as one that takes part in a sign only:
    the derivative by it is zero.
    """
    instances = [found for rule in rules for k in range(SAMPLES) for found in rule.equations(k)]
    settings = [name for name in rules[0].hyper if name not in kept]
    memory = {x for row, _ in instances for x in row} - {*rules[0].hyper}
    names = [*settings, *sorted(memory)]
    rows = []
    for row, right in instances:
        values = [*(row.get(name, 0) for name in names), right]
        size = max(map(abs, values))
        # The rule is not for numbers at which it is not real; and if all are zero, 0 = 0 is said.
        if all(sp.sympify(x).is_real for x in values) and size > 1e-20:
            rows.append([float(x / size) for x in values])
    left, right = np.array(rows)[:, :-1], np.array(rows)[:, -1]
    solution = np.linalg.lstsq(left, right)[0]
    if not np.allclose(left @ solution, right, rtol=0, atol=1e-9):
        raise ArithmeticError(f"{rules[0].name}: no powers of s will do")
    kernel = np.linalg.svd(left)[2][np.linalg.matrix_rank(left, tol=1e-9) :]
    powers = {}
    for i, name in enumerate(settings):
        if np.abs(kernel[:, i]).max(initial=0) < 1e-9:
            powers[name] = round(solution[i])
            if abs(solution[i] - powers[name]) > 1e-9:
                raise ArithmeticError(f"{rules[0].name}: {name} moves by s**{solution[i]}")
    return powers


SAMPLES = 8
DIGITS = 80
SMALL = sp.Float("1e-30", DIGITS)


def sample(symbols: Iterable[sp.Symbol], k: int) -> dict[sp.Symbol, sp.Expr]:
    """The k-th choice of a number for each symbol: less than 1 in size, or whole if it counts."""
    numbers = {}
    for i, symbol in enumerate(sorted(symbols, key=str)):
        if symbol.is_integer:
            numbers[symbol] = sp.Integer(k + i % 5 + 2)
        else:
            size = sp.Float(sp.prime(3 + (7 * i + 5 * k) % 23), DIGITS) / (101 + 2 * i)
            either = not symbol.is_positive and (i * (k + 1) + k) % 3 == 0
            numbers[symbol] = -size if symbol.is_negative or either else size
    return numbers


def scaled(values: Values, powers: Mapping[str, sp.Expr | int]) -> dict[str, sp.Expr]:
    return {name: s ** powers.get(name, 0) * value for name, value in values.items()}


def is_matrix(value: object) -> bool:
    return isinstance(value, sp.MatrixBase)


def entries(value: sp.Expr | sp.MatrixBase) -> list[sp.Expr]:
    return list(value) if is_matrix(value) else [value]


def column(name: str, size: int, **assumptions: bool) -> sp.Matrix:
    return matrix(name, size, 1, **assumptions)


def matrix(name: str, rows: int, columns: int, **assumptions: bool) -> sp.Matrix:
    """A symbol for every entry."""
    digits = (lambda i, j: f"{i + 1}{j + 1}") if columns > 1 else (lambda i, j: f"{i + 1}")
    return sp.Matrix(
        rows, columns, lambda i, j: sp.Symbol(f"{name}_{digits(i, j)}", **(assumptions or REAL))
    )


REAL = {"real": True}


def symbols(names: str, **assumptions: bool) -> dict[str, sp.Symbol]:
    """Symbols by their names."""
    return {name: sp.Symbol(name, **assumptions) for name in names.split()}


def largest(a: sp.Expr, b: sp.Expr) -> sp.Expr:
    """max(a, b) = (a + b + |a - b|) / 2; of numbers, the larger."""
    if sp.sympify(a).is_number and sp.sympify(b).is_number:
        return sp.Max(a, b)
    return (a + b + sp.Abs(a - b)) / 2


def smallest(a: sp.Expr, b: sp.Expr) -> sp.Expr:
    return -largest(-a, -b)


def without_s(x: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """k and y with x = s**k y and, if x is homogeneous in s term by term, no s in y.

    s is taken out of products, powers, absolute values and signs, and out of sums whose terms share
    a power of it: a proof by dimensions, much quicker than factoring. Anything else stays in y.
    """
    if x == s:
        return sp.Integer(1), sp.Integer(1)
    if not x.has(s):
        return sp.Integer(0), x
    if x.is_Pow and not x.exp.has(s):
        k, base = without_s(x.base)
        return k * x.exp, base**x.exp
    powers, args = zip(*map(without_s, x.args), strict=True)
    if x.is_Mul:
        return sp.Add(*powers), sp.Mul(*args)
    if x.is_Add and len(set(powers)) == 1:
        return powers[0], sp.Add(*args)
    if isinstance(x, sp.Abs):
        return powers[0], sp.Abs(*args)
    if isinstance(x, sp.sign):
        return sp.Integer(0), sp.sign(*args)
    return sp.Integer(0), x.func(*(s**k * y for k, y in zip(powers, args, strict=True)))


def _difference(there: sp.Expr, here: sp.Expr, power: sp.Expr) -> sp.Expr:
    """there - s**power here"""
    if is_matrix(there):
        return sp.Matrix(*there.shape, lambda i, j: _difference(there[i, j], here[i, j], power))
    k, rest = without_s(sp.sympify(there))
    return s**k * rest - s**power * here
