"""Each symbolic step is what the real optimiser does, and a wrong exponent is caught.

A new file in theory/optimizers is asked here which optimiser it is about: `REAL`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from typing import Any

import bitsandbytes
import lion_pytorch
import prodigyopt
import pytest
import sympy as sp
import torch

from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.optimizers.base import Group
from theory import theorems
from theory._equivariance import (
    SAMPLES,
    Rule,
    derived,
    entries,
    is_matrix,
    proved,
    s,
    sample,
    scaled,
    without_s,
)

FAMILIES: dict[str, tuple[Rule, ...]] = {
    rules[0].name.split(",")[0]: rules
    for path, module in theorems()
    if path.startswith("optimizers/")
    for rules in module.RULES
}
NUMBERS: dict[str, Any] = {
    "lr": 0.1,
    "unrectified_lr": 0.5,
    "eps": 0.05,
    "eps2": 0.3,
    "weight_decay": 0.2,
    "lambd": 0.15,
    "beta1": 0.8,
    "beta2": 0.95,
    "beta3": 0.9,
    "beta2_decay": -0.8,
    "momentum": 0.7,
    "momentum_decay": 0.3,
    "dampening": 0.3,
    "alpha": 0.9,
    "rho": 0.9,
    "t0": 3.0,
    "d": 1.1,
    "d0": 0.02,
    "d_coef": 30.0,
    "growth_rate": 1.3,
    "r": 0.5,
    "weight_lr_power": 2.0,
    "lr_decay": 0.1,
    "initial_accumulator_value": 0.3,
    "step_sizes": (0.02, 0.3),
    "etas": (0.5, 1.4),
}
Make = Callable[[torch.Tensor, dict[str, Any]], torch.optim.Optimizer]


def ours(kind: str, **options: Any) -> Make:
    """The optimizer that trains."""

    def make(theta: torch.Tensor, numbers: dict[str, Any]) -> torch.optim.Optimizer:
        cls = OPTIMIZERS[kind]
        names = {entry.name for entry in fields(cls)}
        given = {name: value for name, value in numbers.items() if name in names}
        if "betas" in names:
            given["betas"] = (numbers["beta1"], numbers["beta2"])
        rule = cls(**given | options)
        optimizer = rule.build([Group("factors", [theta], numbers["lr"], rule)])
        optimizer.rate = rule.rate  # type: ignore[attr-defined]
        return optimizer

    return make


def theirs(cls: type[torch.optim.Optimizer], *names: str, **options: Any) -> Make:
    """An optimizer or a variant of one that none of ours is."""

    def make(theta: torch.Tensor, numbers: dict[str, Any]) -> torch.optim.Optimizer:
        numbers = numbers | {"betas": (numbers["beta1"], numbers["beta2"])}
        given = {name: numbers[name] for name in ("lr", *names)}
        return cls([theta], **given, **options)

    return make


def adafactor(theta: torch.Tensor, numbers: dict[str, Any]) -> torch.optim.Optimizer:
    eps = (numbers["eps_v"], numbers["eps2"])
    rest = {name: numbers[name] for name in ("lr", "d", "weight_decay", "beta2_decay")}
    return torch.optim.Adafactor([theta], eps=eps, **rest)


def nearest(x: float, table: torch.Tensor) -> float:
    return table[(table - float(x)).abs().argmin()].item()


CODES = {
    name: partial(nearest, table=bitsandbytes.functional.create_dynamic_map(signed=signed).double())
    for name, signed in (("code_mean", True), ("code_square", False))
}


@dataclass(frozen=True)
class Real:
    make: Make
    numbers: Mapping[str, Any] = field(default_factory=dict)  # where they differ from NUMBERS
    memory: Mapping[str, str] = field(default_factory=dict)  # also compared: ours -> theirs
    options: Mapping[str, Any] = field(default_factory=dict)  # of the symbolic step
    dtype: torch.dtype = torch.float64


LARGE = {"lr": 0.4, "d": 1.0}  # enough for its bounds on lr and on rms(u)
SMALL_EPS1 = {"eps_v": 0.4, "eps_r": 0.4}  # acts now and then
SPARSE = theirs(torch.optim.SparseAdam, "eps", "betas")
LBFGS = theirs(torch.optim.LBFGS, max_iter=1, history_size=2, tolerance_grad=0, tolerance_change=0)
LOOK = {"rectified": None}  # which phase it is
RADAM = theirs(torch.optim.RAdam, "eps", "betas", "weight_decay")
EIGHT_BITS = theirs(bitsandbytes.optim.AdamW8bit, "eps", "betas", "weight_decay", min_8bit_size=1)
REAL: dict[str, list[Real]] = {
    "SGD": [Real(ours("sgd"))],
    "SGD with Nesterov": [Real(ours("sgd", nesterov=True), {"dampening": 0.0})],
    "Adam": [Real(ours("adam"))],
    "Adam with AMSGrad": [Real(ours("adam", amsgrad=True))],
    "AdamW": [Real(ours("adamw"))],
    "AdamW with AMSGrad": [Real(ours("adamw", amsgrad=True))],
    "Adamax": [Real(ours("adamax"))],
    "NAdam": [Real(ours("nadam"))],
    "NAdam with decoupled decay": [
        Real(
            theirs(
                torch.optim.NAdam,
                *("eps", "betas", "weight_decay", "momentum_decay"),
                decoupled_weight_decay=True,
            )
        )
    ],
    "RAdam": [
        Real(ours("radam"), options=LOOK),
        Real(RADAM, {"unrectified_lr": 1.0}, options=LOOK),
    ],
    "RMSprop": [Real(ours("rmsprop"))],
    "RMSprop centred": [Real(ours("rmsprop", centered=True))],
    "Rprop": [Real(ours("rprop"))],
    "Adagrad": [Real(ours("adagrad"))],
    "Adadelta": [Real(ours("adadelta"))],
    "ASGD": [Real(ours("asgd"), memory={"average": "ax"})],
    "SparseAdam": [Real(SPARSE)],
    "Lion": [Real(ours("lion")), Real(theirs(lion_pytorch.Lion, "betas", "weight_decay"))],
    "Schedule-free AdamW": [Real(ours("schedulefree"), memory={"z": "z"})],
    "Adafactor of a vector": [Real(ours("adafactor"), LARGE)],
    "Adafactor of a matrix": [Real(ours("adafactor"), LARGE)],
    "Adafactor of a vector with eps1": [Real(adafactor, SMALL_EPS1)],
    "Adafactor of a matrix with two eps1": [Real(adafactor, SMALL_EPS1)],
    "Muon": [Real(ours("muon", nesterov=False))],
    "Muon with Nesterov": [Real(ours("muon"))],
    "8-bit AdamW": [Real(EIGHT_BITS, options=CODES, dtype=torch.float32)],
    "Prodigy": [Real(ours("prodigy", safeguard_warmup=False))],
    "Prodigy with safeguard_warmup": [Real(ours("prodigy"), {"d_coef": 300.0})],
    "Prodigy with coupled decay": [
        Real(
            theirs(
                prodigyopt.Prodigy,
                *("eps", "betas", "weight_decay", "beta3", "d0", "d_coef", "growth_rate"),
                decouple=False,
                use_bias_correction=True,
            )
        )
    ],
    "L-BFGS": [Real(LBFGS), Real(LBFGS, {"size": 0.1})],  # |g|_1 above 1 and below
}


def test_every_rule_is_compared_with_the_real_one():
    assert set(REAL) == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "real"),
    [
        pytest.param(name, real, id=f"{name}-{i}")
        for name in REAL
        for i, real in enumerate(REAL[name])
    ],
)
def test_the_step_is_that_of_the_real_optimizer(name, real, monkeypatch):
    """On a quadratic loss, for more steps than RAdam's first phase has."""
    if "Muon" in name:  # whose orthogonalisation would be rounded to 8 bits
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    rule = FAMILIES[name][-1]
    numbers = NUMBERS | dict(real.numbers)
    hyper = {
        key: sp.Matrix(value) if isinstance(value, tuple) else sp.Float(value)
        for key, value in numbers.items()
        if key in rule.hyper
    }
    shape = rule.state["theta"].shape if is_matrix(rule.state["theta"]) else (3,)
    torch.manual_seed(0)
    theta = torch.randn(shape, dtype=torch.float64)
    theta = theta[:, 0] if shape[-1] == 1 else theta
    slope = torch.randn(theta.numel(), theta.numel(), dtype=torch.float64)
    curvature = numbers.get("size", 1.0) * (slope @ slope.T + torch.eye(len(slope)))
    theta = theta.to(real.dtype).requires_grad_()

    parts = [sp.Matrix(theta.tolist())] if is_matrix(rule.state["theta"]) else theta.tolist()
    states = [rule.beginning(part, hyper) for part in parts]
    default = torch.get_default_dtype()
    torch.set_default_dtype(real.dtype)  # ASGD keeps its rate in it
    try:
        optimizer = real.make(theta, numbers)
        for k in range(9):
            grad = (curvature @ (theta.detach().double().flatten() - 1)).view(theta.shape)
            theta.grad = grad.to(real.dtype)
            split = [sp.Matrix(theta.grad.tolist())] if is_matrix(parts[0]) else theta.grad.tolist()
            if name == "SparseAdam":
                theta.grad = theta.grad.to_sparse()
            for group in optimizer.param_groups:
                group["lr"] = numbers["lr"] * getattr(optimizer, "rate", lambda k: 1.0)(k)
            optimizer.step(*([lambda: torch.tensor(0.0)] if name == "L-BFGS" else []))
            states = [
                rule.step(state | {"grad": part}, hyper, **real.options)
                for state, part in zip(states, split, strict=True)
            ]
            for ours, found in {"theta": theta, **remembered(optimizer, theta, real)}.items():
                expected = [float(x) for state in states for x in entries(state[ours])]
                torch.testing.assert_close(
                    found.detach().flatten(),
                    torch.tensor(expected, dtype=real.dtype),
                    rtol=100 * torch.finfo(real.dtype).eps,
                    atol=100 * torch.finfo(real.dtype).eps,
                )
    finally:
        torch.set_default_dtype(default)


def remembered(optimizer, theta, real):
    return {ours: optimizer.state[theta][key] for ours, key in real.memory.items()}


def pairs(here, there):
    return zip(entries(here), entries(there), strict=True)


def left(rule: Rule, powers: Mapping[str, int], k: int) -> float:
    """By how much the two sides of the theorem differ, in numbers, at s = 3/7; 0: not at all."""
    values = [x for value in (rule.state | rule.hyper).values() for x in entries(sp.sympify(value))]
    numbers = sample({x for x in values if x.is_Symbol}, k) | {s: sp.Rational(3, 7)}

    def at(values):
        return {name: sp.sympify(value).xreplace(numbers) for name, value in values.items()}

    try:
        here = at(scaled(rule.step(at(rule.state), at(rule.hyper)), rule.weights))
        there = rule.step(at(scaled(rule.state, rule.weights)), at(scaled(rule.hyper, powers)))
    except TypeError:  # not a real number, and so neither large nor small
        return 0.0
    steps = [x - y for name in here for x, y in pairs(here[name], there[name])]
    return max(abs(float(abs(sp.N(x)))) for x in (*steps, *rule.unlike_start(powers).values()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_planted_exponent_is_caught_and_the_claimed_ones_are_not(name):
    options = REAL[name][0].options if name == "8-bit AdamW" else {}
    rules = [replace(rule, step=partial(rule.step, **options)) for rule in FAMILIES[name]]
    assert all(left(rule, rule.powers, k) < 1e-60 for rule in rules for k in range(SAMPLES))
    for setting, error in product(rules[0].hyper, (-1, 1)):
        planted = {**rules[0].powers, setting: rules[0].powers.get(setting, 0) + error}
        found = (left(rule, planted, k) for k, rule in product(range(50), rules))
        assert any(difference > 1e-6 for difference in found), setting


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Rprop", "Adadelta"])
def test_a_planted_exponent_is_reported(name):
    claimed = FAMILIES[name][0].powers
    planted = [
        replace(rule, powers={**claimed, "lr": claimed["lr"] + 1}) for rule in FAMILIES[name]
    ]
    reported = [check.claim for check in proved(*planted) if not check.holds()]
    assert any("lr'" in claim for claim in reported)
    assert any(("theta scales" in claim) or ("starts scaled" in claim) for claim in reported)


def test_a_rule_without_a_solution_is_reported():
    """An eps that is added to a gradient and to its square cannot be moved."""
    (rule,) = FAMILIES["SparseAdam"]

    def two_uses(state, hyper):
        grad, eps = state["grad"], hyper["eps"]
        return {"theta": state["theta"] - hyper["lr"] * (grad + eps) / (grad**2 + eps)}

    with pytest.raises(ArithmeticError, match="SparseAdam: no powers of s will do"):
        list(derived(replace(rule, step=two_uses)))


x, y = sp.symbols("x y", real=True)


@pytest.mark.parametrize(
    ("expression", "power", "rest"),
    [
        (s * x + s * y, 1, x + y),
        (sp.sqrt(x**2 / s**2 + y**2 / s**2), -1, sp.sqrt(x**2 + y**2)),
        ((s * x / 2 + s * y) ** y, y, (x / 2 + y) ** y),
        (sp.Abs(s * x - s * y) / s**3, -2, sp.Abs(x - y)),
        (sp.sign(x / s - y / s), 0, sp.sign(x - y)),
        (sp.Function("f")((s * x + s * y) / s), 0, sp.Function("f")(x + y)),
        (s * x + y, 0, s * x + y),
        (s**2 * (x + s), 2, x + s),
        (x**s, 0, x**s),
    ],
)
def test_s_is_taken_out_where_it_is_a_factor(expression, power, rest):
    assert without_s(expression) == (power, rest)
