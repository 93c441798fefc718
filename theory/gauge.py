"""Theorem (gauge). Let T be a sum of terms, each of degree one in every factor that it names, and
let s_1, ..., s_n > 0 be any numbers whose product over each term is gamma / gamma'. Train

    W + gamma T(A)      from A_i,         factor i with settings h_i
    W + gamma' T(A')    from s_i A_i,     factor i with settings h_i moved by the powers of s_i

Then A'_i = s_i A_i at every step, so gamma' T(A') = gamma T(A): the same weight, loss and images.

Proof. The induction of theory/induction.py, factor by factor: if all factors and memories of the
second run are the scaled ones, each by its own s_i, then the updates are equal, and the gradient of
factor i is 1/s_i times the other's (theory/gradient_identity.py). An optimizer that moves each
factor by its own gradient and memory alone sees nothing else, and its step, being equivariant under
s_i with the settings moved by s_i (theory/optimizers), makes A'_i = s_i A_i again.            []

An optimizer that mixes factors, as one that estimates a step size from all of them, needs one s; so
does clipping by a norm of all gradients, unless gradient i counts s_i times in that norm.

Corollaries. (i) A factor that starts at zero starts at zero however it is scaled, so it can carry
all of gamma with no start changed: s = gamma for it and 1 for the others. For LoRA with B = 0,
gamma is the ratio of the learning rates of B and A:

    Adam, AdamW:  lr_B / lr_A = gamma          SGD:  lr_B / lr_A = gamma**2

and eps and decay of B move along. LoHa: the zero factor of its second half. GLoRA: one zero factor
for each of its two terms. This s is of degree one in gamma in every layer, whatever the degrees.
(ii) With gamma = gamma' the runs are distinct descriptions of one training: s_B = 1 / s_A for LoRA
trades the size of B for that of A. theory/coordinates.py says what does not change.
(iii) Every gamma that is a power of two is folded away bit for bit (theory/powers_of_two.py).

`difference` trains both runs for two steps in symbols, with an s for each factor, on the smallest
adapters with such terms; f is the derivative of the loss, an undefined function, positive so that
Adam's roots of squares resolve. Nothing is assumed about A'_i.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy as sp

from theory import Check, Counterexample, Identity, reduced
from theory._equivariance import Rule, Values
from theory.gradient_identity import scales
from theory.homogeneity import Terms
from theory.optimizers import adam, sgd

STEPS = 2
f = sp.Function("f", positive=True)

Settings = Mapping[str, Values]  # of each factor


@dataclass(frozen=True)
class Training:
    """An optimizer, what it trains, and which of its settings take part."""

    rule: Rule
    terms: Terms
    without: tuple[str, ...] = ()  # settings that are 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for term in self.terms for name in term))

    def hyper(self) -> dict[str, sp.Expr]:
        return {k: sp.Integer(0) if k in self.without else h for k, h in self.rule.hyper.items()}

    def update(self, factors: Values) -> sp.Expr:
        """T of factors of one entry each."""
        return sp.Add(*(sp.prod(factors[name] for name in term) for term in self.terms))


def train(training: Training, gamma: sp.Expr, start: Values, hyper: Settings) -> dict[str, sp.Expr]:
    """The factors after `STEPS` steps on a loss L with L' = f."""
    rule, names = training.rule, training.names
    states = {name: rule.beginning(start[name], hyper[name]) for name in names}
    symbols = {name: sp.Symbol(name, positive=True) for name in names}
    update = training.update(symbols)
    for _ in range(STEPS):
        at = {symbols[name]: states[name]["theta"] for name in names}
        slope = f(reduced(gamma * update.xreplace(at)))
        grads = {
            name: gamma * sp.diff(update, symbols[name]).xreplace(at) * slope for name in names
        }
        for name in names:
            given = states[name] | {"grad": grads[name]}
            states[name] = dict(rule.step(given, hyper[name]))
    return {name: states[name]["theta"] for name in names}


def difference(
    training: Training,
    powers: Mapping[str, int],
    given: tuple[dict[str, sp.Expr], sp.Expr] | None = None,
    zero: tuple[str, ...] = (),
) -> sp.Matrix:
    """A'_i - s_i A_i for all factors. `given`: the s_i and gamma; `zero`: what starts there."""
    s, gamma = scales(training.terms) if given is None else given
    start = {i: 0 if i in zero else sp.Symbol(f"a_{i}", positive=True) for i in s}
    hyper = training.hyper()
    moved = {i: {k: h * s[i] ** powers.get(k, 0) for k, h in hyper.items()} for i in s}
    here = train(training, gamma, start, dict.fromkeys(s, hyper))
    there = train(training, sp.Integer(1), {i: s[i] * a for i, a in start.items()}, moved)
    return sp.Matrix([there[i] - s[i] * here[i] for i in s])


def at_numbers(left: sp.Matrix) -> sp.Matrix:
    """For the loss with f(x) = 1 / (1 + x**2), at a fraction for every symbol."""
    left = left.replace(f, lambda x: 1 / (1 + x**2))
    symbols = sorted(left.free_symbols, key=str)
    return left.xreplace({x: sp.Rational(i + 2, i + 4) for i, x in enumerate(symbols)})


LORA = (("B", "A"),)
TUCKER = (("B", "M", "A"),)
GLORA = (("A1", "A2"), ("B1", "B2"))
TRAININGS = (
    Training(sgd.RULES[0][0], LORA),
    Training(sgd.RULES[0][0], TUCKER),
    Training(sgd.RULES[0][0], GLORA),
    Training(adam.RULES[0][0], LORA, without=("weight_decay",)),  # with it, takes minutes
    Training(adam.RULES[2][0], LORA),
)
gamma = sp.Symbol("gamma", positive=True)
ON_B = {"B": gamma, "A": sp.Integer(1)}


def identities() -> Iterator[Check]:
    for training in TRAININGS:
        kind = training.rule.name.split(",")[0]
        left = difference(training, training.rule.powers)
        for name, entry in zip(training.names, left, strict=True):
            within = " + ".join(" ".join(term) for term in training.terms)
            yield Identity(
                f"{kind}, T = {within}: {name}'_{STEPS} = s_{name} {name}_{STEPS}", entry
            )

    for training in TRAININGS:
        if training.terms != LORA:
            continue
        kind, powers = training.rule.name.split(",")[0], training.rule.powers
        ratio = gamma ** powers["lr"]
        left = difference(training, powers, (ON_B, gamma), zero=("B",))
        yield Identity(f"{kind}, LoRA from B = 0: gamma is lr_B / lr_A = {ratio}", left)
        alike = {name: p for name, p in powers.items() if name != "lr"}
        left = at_numbers(difference(training, alike, (ON_B, gamma), zero=("B",)))
        yield Counterexample(f"{kind}, LoRA from B = 0: with lr_B = lr_A it is not", left[0])
