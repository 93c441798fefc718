"""Two steps with a scale for each factor: a setting left alone is caught, Adam's decay too."""

import pytest
import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import Counterexample, gauge
from theory.gauge import GLORA, LORA, TRAININGS, Training, at_numbers, difference, scales, train
from theory.optimizers import adam

COUPLED = Training(adam.RULES[0][0], LORA)  # Adam with its decay, which takes minutes in symbols
MOVING = [
    (t, name) for t in (*TRAININGS, COUPLED) for name in t.rule.powers if name not in t.without
]


@pytest.fixture
def left(monkeypatch):
    """The largest difference in numbers of 50 digits, for the loss with f(x) = 1 / (1 + x**2)."""
    monkeypatch.setattr(gauge, "f", lambda x: 1 / (1 + x**2))
    monkeypatch.setattr(gauge, "reduced", lambda x: x)
    names: dict[str, sp.Float] = {}

    def number(symbol: sp.Symbol) -> sp.Float:
        return names.setdefault(str(symbol), sp.Float(sp.Rational(len(names) + 2, 23), 50))

    def largest(training, powers):
        s, _ = scales(training.terms)
        free = sorted(set().union(*(scale.free_symbols for scale in s.values())), key=str)
        given = {i: scale.xreplace({x: number(x) for x in free}) for i, scale in s.items()}
        gamma = sp.prod(given[name] for name in training.terms[0])
        start = {i: number(f"a_{i}") for i in s}
        hyper = {k: h if h == 0 else number(h) for k, h in training.hyper().items()}
        moved = {i: {k: h * given[i] ** powers.get(k, 0) for k, h in hyper.items()} for i in s}
        here = train(training, gamma, start, dict.fromkeys(s, hyper))
        there = train(training, 1, {i: given[i] * a for i, a in start.items()}, moved)
        return max(abs(there[i] - given[i] * here[i]) for i in s)

    return largest


def test_the_optimizers_are_those_that_they_are_called():
    kinds = [(training.rule.name, training.rule.powers) for training in TRAININGS]
    for name, powers in kinds:
        assert powers == OPTIMIZERS[name.split(",")[0].lower()].powers


def test_adam_with_coupled_decay_at_numbers(left):
    assert left(COUPLED, COUPLED.rule.powers) < 1e-40


@pytest.mark.parametrize(
    ("training", "setting"), MOVING, ids=[f"{t.rule.name}-{len(t.names)}-{n}" for t, n in MOVING]
)
def test_a_setting_left_alone_is_caught(left, training, setting):
    assert left(training, {**training.rule.powers, setting: 0}) > 1e-8


@pytest.mark.parametrize("training", TRAININGS[:3], ids=lambda t: f"{len(t.names)} factors")
def test_a_product_that_is_not_gamma_is_caught(training):
    s, gamma = scales(training.terms)
    wrong = at_numbers(difference(training, training.rule.powers, (s, 2 * gamma)))
    assert Counterexample("", wrong).holds()


def test_the_scales_multiply_to_gamma_over_each_term():
    s, gamma = scales(GLORA)
    assert [sp.simplify(sp.prod(s[name] for name in term) - gamma) for term in GLORA] == [0, 0]
    assert len({symbol for scale in s.values() for symbol in scale.free_symbols}) == 3
