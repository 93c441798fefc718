"""Theorem (coordinates). Let configurations of one adapter differ in gamma and, for each factor i
of its one term, in the size sigma_i of its start (none if it starts at zero) and in those settings
h_i of its optimizer that move by powers p(h) of s_i; none is 0. Two configurations are one training
by theory/gauge.py if and only if these agree:

    gamma * product over i of lr_i**(1/c)               c = p(lr), which is not 0
    h_i * lr_i**(-p(h)/c)                               for every other setting h of each factor
    sigma_i * lr_i**(-1/c)                              for every factor that does not start at zero

Proof. In the logarithms of the settings the gauge is a translation: s_i adds p(h) log s_i to
log h_i, log s_i to log sigma_i, and takes log s_i from log gamma. The expressions are linear in the
logarithms and constant along all these translations (i). If they agree, take s_i**c as the ratio
of the learning rates of factor i: it moves each lr_i to the other one, and then, as the
expressions agree, every other setting too, and gamma (ii). Translations and expressions together
are as many as there are settings, and independent (iii).                                      []

LoRA with B = 0 under AdamW: the 8 settings gamma, sigma_A and lr, eps, weight_decay of A and B make

    gamma lr_A lr_B        sigma_A / lr_A        eps_A lr_A    eps_B lr_B    wd_A lr_A    wd_B lr_B

a space of 6 dimensions: without eps and decay, of 4 settings only 2 count. alpha (which is gamma),
the learning rate, the size of A's start and the ratio lr_B / lr_A of LoRA+ are coordinates of it:

    "Is it alpha or the learning rate?"  Alpha times 4 is lr_B times 4, LoRA+'s ratio; or it is both
    learning rates times 2 and the start of A times 2. It is not both learning rates alone: that
    also divides sigma_A / lr_A.  A sweep over all four repeats itself along two directions.

Under SGD the same with gamma**2 lr_A lr_B and sigma_A**2 / lr_A.

Reference: LoRA+: Efficient Low Rank Adaptation of Large Models (Hayou et al., 2024),
https://arxiv.org/abs/2402.12354, for the ratio.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Check, Counterexample, Identity


@dataclass(frozen=True)
class Space:
    """The configurations of an adapter with one term, under an optimizer."""

    factors: tuple[str, ...]
    zero: tuple[str, ...]  # those that start at 0
    powers: Mapping[str, int]  # of the settings

    def settings(self) -> dict[str, sp.Symbol]:
        names = ["gamma"]
        for i in self.factors:
            names += [f"{setting}_{i}" for setting in self.powers]
            names += [] if i in self.zero else [f"sigma_{i}"]
        return {name: sp.Symbol(name, positive=True) for name in names}

    def moved(self, s: Mapping[str, sp.Expr]) -> dict[sp.Symbol, sp.Expr]:
        """The settings of the same training, its factors s_i times as large."""
        x = self.settings()
        there = {x["gamma"]: x["gamma"] / sp.prod(s.values())}
        for i in self.factors:
            for setting, power in self.powers.items():
                there[x[f"{setting}_{i}"]] = x[f"{setting}_{i}"] * s[i] ** power
            if i not in self.zero:
                there[x[f"sigma_{i}"]] = x[f"sigma_{i}"] * s[i]
        return there

    def invariants(self) -> dict[str, sp.Expr]:
        x, c = self.settings(), self.powers["lr"]

        def against_lr(name: str, i: str, power: int) -> sp.Expr:
            return x[name] * x[f"lr_{i}"] ** -sp.Rational(power, c)

        kept = {
            "gamma": x["gamma"] * sp.prod(x[f"lr_{i}"] ** sp.Rational(1, c) for i in self.factors)
        }
        for i in self.factors:
            for setting, power in self.powers.items():
                if setting != "lr":
                    kept[f"{setting}_{i}"] = against_lr(f"{setting}_{i}", i, power)
            if i not in self.zero:
                kept[f"sigma_{i}"] = against_lr(f"sigma_{i}", i, 1)
        return kept

    def exponents(self, expressions: list[sp.Expr], of: list[sp.Symbol]) -> sp.Matrix:
        """The power of each symbol in each product of powers."""
        return sp.Matrix(
            len(expressions),
            len(of),
            lambda i, j: sp.simplify(of[j] * sp.diff(expressions[i], of[j]) / expressions[i]),
        )


def constant(space: Space) -> Iterator[Identity]:
    """(i)"""
    s = {i: sp.Symbol(f"s_{i}", positive=True) for i in space.factors}
    moved = space.moved(s)
    for kept in space.invariants().values():
        yield Identity(f"{kept} stays", kept.xreplace(moved) - kept)


def sufficient(space: Space) -> sp.Matrix:
    """(ii): what the s_i make of each setting, against the setting that the agreement asks for."""
    x, c = space.settings(), space.powers["lr"]
    other = {name: sp.Symbol(f"{name}'", positive=True) for name in x}
    s = {i: (other[f"lr_{i}"] / x[f"lr_{i}"]) ** sp.Rational(1, c) for i in space.factors}
    # What the other configuration's settings are if the expressions agree and the lr are given.
    known = {x[name]: other[name] for name in x if name.startswith("lr_")}
    moved = space.moved(s)
    left = [moved[symbol] - asked for symbol, asked in known.items()]
    for name, kept in space.invariants().items():
        rates = kept / x[name]  # to some power
        left.append(moved[x[name]] - kept / rates.xreplace(known))
    return sp.Matrix(left)


def complete(space: Space) -> sp.Expr:
    """(iii): settings minus translations minus invariants, each counted by its rank."""
    s = {i: sp.Symbol(f"s_{i}", positive=True) for i in space.factors}
    moved = space.moved(s)
    translations = space.exponents(list(moved.values()), list(s.values())).rank()
    kept = space.exponents(list(space.invariants().values()), list(moved)).rank()
    return sp.Integer(len(moved) - translations - kept)


SPACES = {
    "LoRA, AdamW": Space(("B", "A"), ("B",), OPTIMIZERS["adamw"].powers),
    "LoRA, Adam": Space(("B", "A"), ("B",), OPTIMIZERS["adam"].powers),
    "LoRA, SGD": Space(("B", "A"), ("B",), OPTIMIZERS["sgd"].powers),
    "LoHa, AdamW": Space(("B1", "A1", "B2", "A2"), ("B2",), OPTIMIZERS["adamw"].powers),
}


def identities() -> Iterator[Check]:
    for name, space in SPACES.items():
        for identity in constant(space):
            yield Identity(f"{name}: {identity.claim}", identity.difference)
        claim = f"{name}: where these agree, every setting is moved to the other's"
        yield Identity(claim, sufficient(space))
        settings, kept = len(space.settings()), len(space.invariants())
        claim = f"{name}: {settings} settings, {kept} that count, {len(space.factors)} that do not"
        yield Identity(claim, complete(space))

    bare = Space(("B", "A"), ("B",), {"lr": OPTIMIZERS["adamw"].powers["lr"]})
    yield from alpha_or_lr(bare)


def alpha_or_lr(space: Space) -> Iterator[Check]:
    """LoRA with B = 0 under AdamW without eps and decay."""
    x = space.settings()

    def left(**times: int) -> sp.Matrix:
        """What counts, with settings multiplied by these numbers, against alpha times 4."""
        there = {x[name]: by * x[name] for name, by in times.items()}
        alpha = {x["gamma"]: 4 * x["gamma"]}
        kept = space.invariants().values()
        return sp.Matrix([e.xreplace(there) / e - e.xreplace(alpha) / e for e in kept])

    yield Identity("alpha x 4 is lr_B x 4", left(lr_B=4))
    yield Identity("alpha x 4 is lr x 2 and the start x 2", left(lr_B=2, lr_A=2, sigma_A=2))
    yield Counterexample("alpha x 4 is not lr x 2 alone", left(lr_B=2, lr_A=2))
    yield Counterexample("alpha x 4 is not lr x 4 alone", left(lr_B=4, lr_A=4))
    yield Counterexample("alpha x 4 is not the start x 4", left(sigma_A=4))
