"""The theorem from end to end: two steps, and what a setting left alone does to them."""

import pytest
import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory.induction import TRAININGS, difference, f

SETTINGS = {"SGD": ("lr", "weight_decay")} | dict.fromkeys(
    ("Adam", "AdamW"), ("lr", "eps", "weight_decay")
)
NUMBERS = {
    "s": "3/7",
    "lr": "1/9",
    "eps": "1/5",
    "weight_decay": "2/7",
    "beta1": "4/5",
    "beta2": "6/7",
}
NUMBERS |= {"momentum": "2/3", "dampening": "1/4", "a_1": "4/3", "a_2": "7/5"}


def left(training, degree, powers):
    """The difference at rational numbers, for the loss with derivative 1 / (1 + x**2)."""
    (entry, *_) = difference(training, degree, powers).replace(f, lambda x: 1 / (1 + x**2))
    return abs(entry.subs({q: sp.Rational(NUMBERS[str(q)]) for q in entry.free_symbols}).evalf(60))


@pytest.mark.parametrize(
    ("training", "degree"),
    [(training, degree) for training in TRAININGS for degree in training.degrees if degree < 3],
    ids=lambda value: getattr(value, "name", value),
)
def test_two_steps_agree_and_a_setting_left_alone_is_caught(training, degree):
    powers = OPTIMIZERS[training.optimizer].powers
    assert left(training, degree, powers) < 1e-50
    for setting in SETTINGS[training.name]:
        assert left(training, degree, {**powers, setting: 0}) > 1e-4, setting
