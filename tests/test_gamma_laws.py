"""The gamma theorem over everything it speaks of: adapters, gamma, losses and optimizers at random.

Each case trains a small network twice for 50 steps: with W + T(A), and with W + gamma T(A') where
A'_i = A_i / s_i, gamma = prod s_i, and every setting moved by its power of 1 / s_i
(tests/gamma_runs.py). Both must apply the same update at every step. The s_i of the factors of one
T differ wherever the optimizer lets them. And whatever is left where it was must be seen.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.optimizers.adadelta import Adadelta
from lyco_lab.optimizers.radam import RAdam
from tests.gamma_runs import (
    LBFGS,
    Layer,
    LBFGSRun,
    Problem,
    Product,
    Run,
    SparseAdam,
    SparseRun,
    gammas_of,
    gap,
    moved,
    off,
    ones,
    problems,
    splits,
)
from tests.optimizers.law import base_lr, rules, standard
from tests.strategies import random_factors, random_weight

BOUND = 1e-12  # of the distance of two updates at any step, in units of the longest update
DIFFERENT = 1e-3  # of the same, in units of how far training went

MOVING = {name: cls for name, cls in OPTIMIZERS.items() if not cls.no_gamma}
ALL = MOVING | {"sparseadam": SparseAdam, "lbfgs": LBFGS}
RUNS = {SparseAdam: SparseRun, LBFGS: LBFGSRun}
every_optimizer = pytest.mark.parametrize("cls", ALL.values(), ids=ALL.keys())

WORST = {}  # by optimizer, for who runs this file to measure


def check(cls, data):
    problem = data.draw(problems())
    rule = data.draw(rules(cls))
    if any(rule.accepts(nn.Parameter(v)) for layer in problem.layers for v in layer.start.values()):
        reject()
    # Where an optimizer rounds to a few bits, only powers of two leave all of them as they are.
    scales = data.draw(splits(problem, bool(cls.one_scale), bool(cls.coarse)))
    settings, run = moved(rule, 0.2 * base_lr(cls)), RUNS.get(cls, Run)
    without = run(problem, ones(problem), [1.0] * len(problem.layers), settings).go()
    gamma = run(problem, scales, gammas_of(problem, scales), settings).go()
    WORST[cls.__name__] = max(WORST.get(cls.__name__, 0.0), gap(without, gamma))
    assert gap(without, gamma) <= BOUND


@every_optimizer
@settings(max_examples=4)
@given(data=st.data())
def test_gamma_is_a_start_and_settings(cls, data):
    check(cls, data)


@pytest.mark.slow
@every_optimizer
@settings(max_examples=110)
@given(data=st.data())
def test_gamma_is_a_start_and_settings_in_thousands_of_cases(cls, data):
    check(cls, data)


# What is left where it was.


def fixed(clip=None):
    """Two layers, of degrees 2 and 3."""
    layers = []
    for seed, t in enumerate([Product((12, 8), 3, (2,)), Product((6, 10), 2, (3,))]):
        rng = torch.Generator().manual_seed(seed)
        start = {
            name: 0.7 * torch.randn(size, generator=rng, dtype=torch.float64)
            for name, size in t.sizes().items()
        }
        layers.append(
            Layer(t.transform, t.shape, random_weight(t.shape, seed), start, (tuple(start),))
        )
    return Problem(layers, "squares", 0, clip)


def pair(cls, problem, settings, wrong=None, s=0.125, **faults):
    """The run without gamma, and one with it that has these faults."""
    scales = [dict.fromkeys(layer.start, s) for layer in problem.layers]
    run = RUNS.get(cls, Run)
    without = run(problem, ones(problem), [1.0, 1.0], settings).go()
    gamma = run(problem, scales, gammas_of(problem, scales), wrong or settings, **faults).go()
    return without, gamma


@every_optimizer
def test_a_start_left_alone_is_seen(cls):
    settings = moved(standard(cls), base_lr(cls))
    assert gap(*pair(cls, fixed(), settings)) <= BOUND
    assert off(*pair(cls, fixed(), settings, scales_start=False)) > DIFFERENT


@pytest.mark.parametrize("cls", [cls for cls in ALL.values() if cls is not LBFGS])
def test_a_clipping_left_alone_is_seen(cls):
    problem, settings = fixed(clip=0.5), moved(standard(cls), base_lr(cls))
    assert gap(*pair(cls, problem, settings)) <= BOUND
    there = pair(cls, problem, settings, scales_clip=False)
    if cls.__name__ == "Rprop":  # looks at signs alone, and clipping changes none
        assert gap(*there) <= BOUND
    else:
        assert off(*there) > DIFFERENT


@pytest.mark.parametrize(
    ("cls", "setting"), [(cls, setting) for cls in ALL.values() for setting in cls.powers]
)
def test_a_setting_left_alone_is_seen(cls, setting):
    rule, lr = standard(cls), base_lr(cls)

    def wrong(s):
        right, right_lr = moved(rule, lr)(s)
        if setting == "lr":
            return right, lr
        return replace(right, **{setting: getattr(rule, setting)}), right_lr

    assert off(*pair(cls, fixed(), moved(rule, lr), wrong)) > DIFFERENT


def test_a_step_of_lbfgs_without_memory_moves_as_no_other():
    class Unmoved(LBFGSRun):
        empty_power = 0

    problem, settings = fixed(), moved(LBFGS(), 0.0)
    scales = [dict.fromkeys(layer.start, 0.125) for layer in problem.layers]
    without = LBFGSRun(problem, ones(problem), [1.0, 1.0], settings).go()
    unmoved = Unmoved(problem, scales, gammas_of(problem, scales), settings).go()
    assert off(without, unmoved) > DIFFERENT


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_no_constant_power_of_lr_will_do_for_radam(power):
    rule, lr = RAdam(eps=0.02), base_lr(RAdam)

    def constant(s):
        right, _ = moved(rule, lr)(s)
        return replace(right, unrectified_lr=rule.unrectified_lr), lr * s**-power

    assert gap(*pair(RAdam, fixed(), moved(rule, lr))) <= BOUND
    assert off(*pair(RAdam, fixed(), moved(rule, lr), constant)) > DIFFERENT


def test_adadelta_follows_one_pair_of_powers_and_not_the_published_one():
    """That lr stays is claimed of eps = 0, where nothing moves and any two runs agree."""

    def powers(eps, lr_power, eps_power):
        return lambda s: (Adadelta(eps=eps * s**-eps_power), s**-lr_power)

    def path(s, settings):
        problem = fixed()
        scales = [dict.fromkeys(layer.start, s) for layer in problem.layers]
        return Run(problem, scales, gammas_of(problem, scales), settings).go()

    without = path(1.0, powers(1e-6, 0, 0))
    for pair_of in itertools.product((0, 1, 2), (-2, 0, 2)):
        distance = off(without, path(0.125, powers(1e-6, *pair_of)))
        assert distance < BOUND if pair_of == (2, -2) else distance > DIFFERENT
    still = path(1.0, powers(1e-30, 0, 0))
    assert gap(still, path(0.125, powers(1e-30, 0, 0))) <= BOUND
    assert (still[-1] - still[0]).norm() < 1e-10 * still[0].norm()


@pytest.mark.parametrize("kind", [name for name, c in ADAPTERS.items() if not c().terms((8, 8))])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_scaling_of_its_factors_takes_gamma_from_a_rotation(kind, optimizer):
    """gamma (W' - W) against W' - W of factors that start at s times the others, for any s."""
    assert closest(ADAPTERS[kind](), optimizer) > DIFFERENT


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_same_search_finds_loras(optimizer):
    assert closest(ADAPTERS["lora"](), optimizer) <= BOUND


def closest(adapter, optimizer, gamma=0.25):
    """The least distance over s = gamma**(1 / m), m = 1..3, and every power of lr up to 2."""
    cls, shape = OPTIMIZERS[optimizer], (8, 8)
    rule, lr = cls(weight_decay=0.0), 0.05
    weight = random_weight(shape, 0)
    start = {k: 0.3 * v for k, v in random_factors(adapter, weight, 0).items()}

    def path(s, gamma, rule, lr):
        layer = Layer(
            lambda factors, _: adapter.delta(weight, factors) / adapter_gamma,
            shape,
            weight,
            {name: value * s for name, value in start.items()},
            (),
        )
        problem = Problem([layer], "squares", 0)
        return Run(problem, ones(problem), [gamma], lambda _: (rule, lr)).go()

    adapter_gamma = adapter.gamma(shape) or 1.0
    with_gamma = path(1.0, gamma, rule, lr)
    distances = []
    for m, power in itertools.product((1, 2, 3), (0, 1, 2)):
        s = gamma ** (1 / m)
        distances.append(off(with_gamma, path(s, 1.0, rule.scaled(s), lr * s**power)))
    assert math.isfinite(min(distances))
    return min(distances)
