"""What the theorems about optimisers share: the meaning of equivariance, and how it is solved for.

An optimiser is a map (state; hyper) -> state, where the state holds the factors theta, the gradient
just measured, and whatever else the rule remembers. Folding gamma away multiplies theta by s and,
by theory/gradient_identity.py, the gradient by 1/s. The optimiser is *equivariant* if some moved
hyperparameters hyper' make its step commute with that scaling,

    step(scaled(state); hyper')  =  scaled(step(state; hyper)),

where each further entry of the state has the weight, a power of s, that makes this possible
(a running mean of gradients: -1; of their squares: -2; a count of steps: 0).

If the step's direction is homogeneous of degree k in the gradients, theta - lr * direction is
equivariant with lr' = lr * s**(1 + k): k = 1 for SGD, k = 0 for Adam. The theorems do not rely on
this rule of thumb: they solve the displayed equation for hyper', in symbols.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import sympy as sp

from lyco_lab.gamma import POWERS
from theory import Identity

Values = Mapping[str, sp.Expr]

s = sp.Symbol("s", positive=True)


@dataclass(frozen=True)
class Rule:
    """An update rule in symbols, at one moment of training (the first step, or any later one)."""

    name: str
    optimizer: str  # whose row of lyco_lab.gamma.POWERS it is compared with
    step: Callable[[Values, Values], Values]
    state: Values
    weights: Mapping[str, int]  # entry of the state -> its power of s
    hyper: Values

    def scaled(self, state: Values) -> dict[str, sp.Expr]:
        return {name: s ** self.weights[name] * value for name, value in state.items()}

    def residual(self, moved: Values) -> dict[str, sp.Expr]:
        """step(scaled(state); moved) - scaled(step(state; hyper)), for all the step returns."""
        here = self.scaled(self.step(self.state, self.hyper))
        there = self.step(self.scaled(self.state), moved)
        return {name: there[name] - here[name] for name in here}

    def solve(self) -> dict[str, sp.Expr]:
        """The one way to move the hyperparameters that gamma moves, so that no residual is left.

        The residuals must vanish for every value of the state, so their numerators must vanish
        coefficient by coefficient as polynomials in it.
        """
        unknown = {name: sp.Symbol(f"{self.hyper[name]}'", positive=True) for name in self.moving}
        variables = sorted(
            set().union(*(sp.sympify(value).free_symbols for value in self.state.values())),
            key=str,
        )
        equations: list[sp.Expr] = []
        for left in self.residual({**self.hyper, **unknown}).values():
            numerator, _ = sp.fraction(sp.together(left))
            equations += sp.Poly(sp.expand(numerator), *variables).coeffs()
        solutions = sp.solve(equations, list(unknown.values()), dict=True)
        if len(solutions) != 1 or set(solutions[0]) != set(unknown.values()):
            raise ArithmeticError(f"{self.name}: expected one solution, found {solutions}")
        return {name: sp.simplify(solutions[0][symbol]) for name, symbol in unknown.items()}

    @property
    def moving(self) -> tuple[str, ...]:
        """The hyperparameters that take part in the step and may have to move."""
        return tuple(name for name in self.hyper if name in POWERS[self.optimizer])

    def tabled(self) -> dict[str, sp.Expr]:
        """What lyco_lab.gamma makes of the hyperparameters that move."""
        powers = POWERS[self.optimizer]
        return {name: self.hyper[name] * s ** powers[name] for name in self.moving}

    def solution_is_the_table(self, solution: Values) -> Iterator[Identity]:
        for name, tabled in self.tabled().items():
            claim = f"{self.name}: {self.hyper[name]}' = {solution[name]}, as in lyco_lab.gamma"
            yield Identity(claim, solution[name] - tabled)

    def is_equivariant(self, solution: Values) -> Iterator[Identity]:
        for name, left in self.residual({**self.hyper, **solution}).items():
            claim = f"{self.name}: {name} scales by s**{self.weights[name]}"
            yield Identity(claim, left)
