"""Adam and AdamW: the steps are torch's, and a wrong exponent is caught at the first step."""

import pytest
import sympy as sp
import torch

from theory import is_zero
from theory._equivariance import s
from theory.adam import HYPER, RULES, adam, adamw

every_optimizer = pytest.mark.parametrize("rules", RULES, ids=["adam", "adamw"])


@pytest.mark.parametrize(
    ("step", "optimizer"), [(adam, torch.optim.Adam), (adamw, torch.optim.AdamW)]
)
def test_the_step_is_that_of_torch(step, optimizer):
    hyper = {"lr": 0.1, "eps": 0.05, "weight_decay": 0.2}
    theta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    running = optimizer([theta], betas=(0.8, 0.95), **hyper)
    state = {"theta": 0.5, "mean": 0.0, "square": 0.0, "steps": 0}
    for grad in (0.3, -1.1, 0.8, 1e-3):
        theta.grad = torch.tensor([grad], dtype=torch.float64)
        running.step()
        state = step(state | {"grad": grad}, hyper | {"beta1": 0.8, "beta2": 0.95})
        assert theta.item() == pytest.approx(float(state["theta"]), rel=1e-13)


@every_optimizer
@pytest.mark.parametrize("setting", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("error", [-1, 1])
def test_a_wrong_exponent_is_caught(rules, setting, error):
    right = rules[0].solve()
    wrong = HYPER | right | {setting: right[setting] * s**error}
    assert not is_zero(rules[0].residual(wrong)["theta"])


@every_optimizer
@pytest.mark.parametrize("setting", ["eps", "weight_decay"])
def test_a_setting_left_alone_is_caught(rules, setting):
    moved = HYPER | rules[0].solve() | {setting: HYPER[setting]}
    assert not is_zero(rules[0].residual(moved)["theta"])


@every_optimizer
def test_at_a_later_step_a_wrong_move_leaves_more_than_rounding(rules):
    _, later = rules
    numbers = {"theta": 0.5, "grad": -0.3, "m": 0.2, "v": 0.7, "t": 3, "s": 0.25}
    numbers |= {"lr": 0.1, "eps": 0.02, "wd": 0.3, "beta1": 0.9, "beta2": 0.99}

    def left(moved):
        expression = later.residual(HYPER | moved)["theta"]
        return abs(float(expression.subs({q: numbers[str(q)] for q in expression.free_symbols})))

    right = rules[0].solve()
    assert left(right) < 1e-15
    assert left(right | {"lr": HYPER["lr"] * s**2}) > 1e-4
    assert left(right | {"eps": HYPER["eps"]}) > 1e-6


def test_a_rule_without_a_solution_is_reported():
    """An eps that serves two quantities of different degree cannot be moved (as in Adadelta)."""
    first, _ = RULES[0]

    def two_uses(state, hyper):
        eps = hyper["eps"]
        return {
            "theta": state["theta"]
            - hyper["lr"] * (state["grad"] + eps) / (state["grad"] ** 2 + eps)
        }

    rule = type(first)("two uses", "adam", two_uses, first.state, first.weights, HYPER)
    with pytest.raises(ArithmeticError, match="two uses: expected one solution"):
        rule.solve()
    assert sp.sympify(first.state["steps"]) == 0
