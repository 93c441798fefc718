"""SGD: the step is torch's, a wrong exponent is caught, and a wrong table would be."""

import pytest
import torch

from lyco_lab import gamma
from theory import is_zero
from theory._equivariance import s
from theory.sgd import HYPER, RULES, nesterov_step, step

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_step_is_that_of_torch(nesterov):
    hyper = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.7, "dampening": 0.0 if nesterov else 0.3}
    theta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], nesterov=nesterov, **hyper)
    state = {"theta": 0.5}
    for grad in (0.3, -1.1, 0.8):
        theta.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        state = (nesterov_step if nesterov else step)(state | {"grad": grad}, hyper)
        assert theta.item() == pytest.approx(state["theta"], rel=1e-14)


@every_rule
@pytest.mark.parametrize("setting", ["lr", "weight_decay"])
@pytest.mark.parametrize("error", [-2, -1, 1])
def test_a_wrong_exponent_is_caught(rule, setting, error):
    right = rule.solve()
    assert all(is_zero(left) for left in rule.residual(HYPER | right).values())
    wrong = HYPER | right | {setting: right[setting] * s**error}
    assert not is_zero(rule.residual(wrong)["theta"])


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if "buffer" in rule.state], ids=lambda rule: rule.name
)
@pytest.mark.parametrize("setting", ["momentum", "dampening"])
def test_what_stays_must_stay(rule, setting):
    moved = HYPER | rule.solve() | {setting: HYPER[setting] * s}
    assert not all(is_zero(left) for left in rule.residual(moved).values())


def test_a_wrong_table_would_be_caught(monkeypatch):
    wrong = {"sgd": {"lr": 1, "weight_decay": -2}}
    monkeypatch.setattr("theory._equivariance.POWERS", wrong)
    rule = RULES[0]
    holds = [identity.holds() for identity in rule.solution_is_the_table(rule.solve())]
    assert holds == [False, True]
    assert gamma.exponent("sgd") == 2
