"""Theorem (bits). Let a program compute with numbers of p digits, each operation rounding once:

    fl(x op y) = rnd(x op y)
    rnd(x)     = u(x) near(x / u(x)),          u(x) = 2**(floor(log2|x|) - p + 1)

where near is any rounding to a whole number (to even, up, towards zero, at random from a given
seed; or a library's root, which is now and then one off): binary floating point, with no smallest
or largest exponent. Let every value v have a weight w(v), a whole number, such that

    x + y, x - y, x < y, max(x, y)      only where w(x) = w(y), which is the sum's and the max's
    x y, x / y, sqrt(x)                 w(x) + w(y),   w(x) - w(y),   w(x) / 2 where that is whole
    any other function                  only of values of weight 0; so are its value, and constants

Then, for whole k, the program that is given 2**(k w) times each input has 2**(k w) times each
value, in every bit: it takes the same branches and its outputs are the scaled ones.

Proof. By induction over the program it is enough that each operation commutes with such scalings,
and as each is exact but for its rounding, that  rnd(2**k x) = 2**k rnd(x).  Since k is whole,
floor(log2|2**k x|) = k + floor(log2|x|), so u(2**k x) = 2**k u(x) and x / u(x), which near rounds,
is what it was. Comparisons: 2**k > 0.                                                         []

For the theorem on gamma: a training is such a program in which factors have weight 1, their
gradients -1, what an optimizer remembers its own (theory/optimizers), and W' and the loss 0. So if
s = 2**k, the runs with gamma and without are equal bit for bit, losses and weights; also where
precisions are mixed, since each operation may have its own p. And by theory/gauge.py every gamma
that is a power of two can be folded so, as s_i = 2**(k_i) with the k_i adding up to that power.

It ends where the model does, each shown by a counterexample:

    s no power of two       rounding does not commute with 3, nor with a root of two
    sqrt of odd weight      needs even k
    subnormal numbers       u(x) >= the smallest number there is: digits are lost on one side only
    overflow                the same at the largest number
    constants               a number that is added and not moved, such as an eps, is of weight 0

Reference: What Every Computer Scientist Should Know About Floating-Point Arithmetic (Goldberg,
1991), for the model: https://doi.org/10.1145/103162.103163
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Check, Counterexample, Identity

Nearest = Callable[[sp.Expr], sp.Expr]

k, j = sp.symbols("k j", integer=True)
p = sp.Symbol("p", integer=True, positive=True)
x, y, z = sp.symbols("x y z", real=True, nonzero=True)
near = sp.Function("near", real=True, nonzero=True)

# What a step of AdamW is given beside its settings, in terms of s = 2**k.
STATE = {"theta": 1, "g": -1, "m": -1, "v": -2, "beta": 0, "1 - beta": 0, "1": 0}


def rounded(x: sp.Expr, p: sp.Expr, near: Nearest, least: sp.Expr | None = None) -> sp.Expr:
    """rnd(x), for x that is not 0, which stays 0; `least` is the smallest number, if there is one.

    SymPy takes whole numbers out of a floor once the logarithm of a product is a sum.
    """
    x = sp.powsimp(sp.factor(x))
    if x == 0:
        return x
    binade = sp.floor(sp.expand(sp.expand_log(sp.log(sp.Abs(x), 2))))
    unit = 2 ** (binade - p + 1)
    if least is not None:
        unit = sp.Max(unit, least)
    return sp.powsimp(unit * near(sp.powsimp(x / unit)))


def half_even(y: sp.Expr) -> sp.Expr:
    """The nearest whole number, and of two as near the even one."""
    whole = sp.floor(y + sp.Rational(1, 2))
    tie = whole == y + sp.Rational(1, 2)
    return whole - 1 if tie and whole % 2 else whole


def rnd(x: sp.Expr) -> sp.Expr:
    return rounded(x, p, near)


def three_bits(x: sp.Expr, least: sp.Expr | None = None) -> sp.Expr:
    """rnd with p = 3, to even."""
    return rounded(sp.sympify(x), sp.Integer(3), half_even, least)


@dataclass
class Program:
    """Operations done one after another, each with what is left of its equality."""

    differences: list[sp.Expr] = field(default_factory=list)

    def value(self, weight: int) -> "Value":
        return Value(self, sp.Dummy("x", real=True, nonzero=True), weight)

    def done(self, exact: Callable[..., sp.Expr], given: list["Value"], weight: int) -> "Value":
        """An operation, after which its value is again any number."""
        here = rnd(exact(*(v.number for v in given)))
        there = rnd(exact(*(2 ** (k * v.weight) * v.number for v in given)))
        self.differences.append(there - 2 ** (k * weight) * here)
        return self.value(weight)


@dataclass
class Value:
    """A number of a program, with the weight that the theorem's rules give it."""

    program: Program
    number: sp.Expr
    weight: int

    def __add__(self, other: "Value") -> "Value":
        return self.program.done(lambda x, y: x + y, [self, other], self._same(other))

    def __sub__(self, other: "Value") -> "Value":
        return self.program.done(lambda x, y: x - y, [self, other], self._same(other))

    def __mul__(self, other: "Value") -> "Value":
        return self.program.done(lambda x, y: x * y, [self, other], self.weight + other.weight)

    def __truediv__(self, other: "Value") -> "Value":
        return self.program.done(lambda x, y: x / y, [self, other], self.weight - other.weight)

    def sqrt(self) -> "Value":
        if self.weight % 2:
            raise TypeError(f"the square root of a value of weight {self.weight}")
        return self.program.done(lambda x: sp.sqrt(sp.Abs(x)), [self], self.weight // 2)

    def _same(self, other: "Value") -> int:
        if self.weight != other.weight:
            raise TypeError(f"a sum of values of weights {self.weight} and {other.weight}")
        return self.weight


def adamw(weights: Mapping[str, int]) -> tuple[Value, Program]:
    """Theta after a step of AdamW, and what it took. `weights`: of what the step is given."""
    program = Program()
    given = {name: program.value(weight) for name, weight in weights.items()}
    theta, g, lr, beta, rest = (given[name] for name in ("theta", "g", "lr", "beta", "1 - beta"))
    m = beta * given["m"] + rest * g
    v = beta * given["v"] + rest * g * g
    kept = theta * (given["1"] - lr * given["weight_decay"])
    return kept - lr * (m / (v.sqrt() + given["eps"])), program


def operations() -> Iterator[Identity]:
    a, b = 2**k, 2**j
    yield Identity("rnd(2**k x) = 2**k rnd(x)", rnd(a * x) - a * rnd(x))
    yield Identity("x + y, both times 2**k", rnd(a * x + a * y) - a * rnd(x + y))
    yield Identity("x - y, both times 2**k", rnd(a * x - a * y) - a * rnd(x - y))
    yield Identity("x y, times 2**k and 2**j", rnd(a * x * b * y) - a * b * rnd(x * y))
    yield Identity("x / y, times 2**k and 2**j", rnd(a * x / (b * y)) - a / b * rnd(x / y))
    fused = rnd(a * x * b * y + a * b * z) - a * b * rnd(x * y + z)
    yield Identity("x y + z rounded once, times 2**k, 2**j and 2**(k + j)", fused)
    root = rnd(sp.sqrt(a**2 * sp.Abs(x))) - a * rnd(sp.sqrt(sp.Abs(x)))
    yield Identity("sqrt(x), times 2**(2 k)", root)
    less = sp.sign(sp.factor(a * x - a * y)) - sp.sign(x - y)
    yield Identity("x < y, both times 2**k", less)


def identities() -> Iterator[Check]:
    yield from operations()

    moving = OPTIMIZERS["adamw"].powers
    theta, program = adamw(STATE | {name: moving[name] for name in ("lr", "eps", "weight_decay")})
    claim = f"AdamW, theta of weight {theta.weight}: each of {len(program.differences)} operations"
    yield Identity(claim, sp.Matrix(program.differences))

    r = three_bits
    yield Counterexample("s = 3: rnd(3 x) is not 3 rnd(x)", r(15) - 3 * r(5))
    total = r(3 * 8 + 3 * 1) - 3 * r(8 + 1)
    yield Counterexample("s = 3: nor is a sum of numbers that are exact, times 3", total)
    irrational = r(sp.sqrt(2)) - sp.sqrt(2) * r(1)
    yield Counterexample("s = sqrt(2): no number times it is a number", irrational)
    odd = r(sp.sqrt(2 * 3)) - sp.sqrt(2) * r(sp.sqrt(3))
    yield Counterexample("sqrt(2 x) is not 2**(1/2) sqrt(x)", odd)
    constant = r(2 * 1 + 1) - 2 * r(1 + 1)
    yield Counterexample("a constant that is not moved: 2 x + 1 is not 2 (x + 1)", constant)
    five = sp.Rational(5, 4)
    least = sp.Rational(1, 16)
    subnormal = r(five / 8, least) - r(five, least) / 8
    yield Counterexample("below the smallest normal number digits are lost", subnormal)
    largest = 7  # what is above is infinite; compared by what 1 is divided by it
    overflow = _inverse(r(2 * five * 4), largest) - _inverse(r(five * 4), largest) / 2
    yield Counterexample("above the largest number all are", overflow)


def _inverse(x: sp.Expr, largest: int) -> sp.Expr:
    return sp.Integer(0) if x > largest else 1 / x
