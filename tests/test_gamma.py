"""The gamma theorem on the adapters that train, with torch's own optimisers.

Every case trains a small regression twice: W + gamma T(A), and W + T(A') with the settings that
`rewrite` gives. The two must apply the same update at every step; with any one setting left where
it was they must not.
"""

import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.base import Additive
from lyco_lab.adapters.mount import attach
from lyco_lab.errors import UserError
from lyco_lab.gamma import POWERS, Rewrite, exponent, is_power_of_two, rewrite, scale
from lyco_lab.seeds import generator
from tests.strategies import adapters, random_factors, random_weight, seeds, shapes

STEPS = 24
# Both runs round differently, and training amplifies it.
BOUND = 512 * torch.finfo(torch.float64).eps
DIFFERENT = 0.05

ADDITIVE = {name: cls for name, cls in ADAPTERS.items() if issubclass(cls, Additive)}
every_additive = pytest.mark.parametrize("cls", ADDITIVE.values(), ids=ADDITIVE.keys())
every_optimizer = pytest.mark.parametrize("optimizer", POWERS)
gammas = st.floats(min_value=-4, max_value=4).map(lambda exponent: 10.0**exponent)

# Settings at which every part of a recipe matters: decay, an eps as large as the gradients, and a
# clipping that is active. They belong to the run without gamma.
RECIPES = {
    "sgd": Rewrite(init_scale=1.0, lr=0.05, weight_decay=0.3, grad_clip=0.5),
    "adam": Rewrite(init_scale=1.0, lr=0.01, eps=1e-2, weight_decay=0.3, grad_clip=0.5),
    "adamw": Rewrite(init_scale=1.0, lr=0.01, eps=1e-2, weight_decay=3.0, grad_clip=0.5),
}


def train(adapter, shape, seed, gamma, optimizer, recipe, dtype=torch.float64):
    """The loss and gamma T(A) after every step of a regression with a warmed-up schedule."""
    rng = generator(seed, "regression")
    weight = torch.randn(shape, dtype=torch.float64, generator=rng).to(dtype)
    start = adapter.init(weight, generator(seed, "init"))
    factors = {k: (recipe.init_scale * v).requires_grad_() for k, v in start.items()}
    x_NQ = torch.randn(8, math.prod(shape[1:]), dtype=torch.float64, generator=rng).to(dtype)
    y_NP = torch.randn(8, shape[0], dtype=torch.float64, generator=rng).to(dtype)
    running = make_optimizer(optimizer, list(factors.values()), recipe)
    warm_up = torch.optim.lr_scheduler.LambdaLR(running, lambda step: min(1.0, (step + 1) / 8))
    losses, deltas = [], []
    for _ in range(STEPS):
        delta = gamma * adapter.transform(factors, shape)
        loss = (x_NQ @ (weight + delta).flatten(1).T - y_NP).square().mean()
        running.zero_grad()
        loss.backward()
        clip(list(factors.values()), recipe.grad_clip)
        running.step()
        warm_up.step()
        losses.append(loss.detach())
        deltas.append((gamma * adapter.transform(factors, shape)).detach())
    return torch.stack(losses), torch.stack(deltas)


def make_optimizer(name, parameters, recipe):
    common = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **common)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, betas=(0.9, 0.99), eps=recipe.eps, **common)


def clip(parameters, max_norm):
    """Clipping by global norm, without the 1e-6 that torch adds to the norm."""
    if max_norm is None:
        return
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters]))
    for parameter in parameters:
        parameter.grad.mul_(torch.clamp(max_norm / norm, max=1.0))


def folded_back(gamma, degree, optimizer, **changes):
    """The recipe under gamma whose rewriting is the recipe above: stable whatever gamma is."""
    return rewrite(1 / gamma, degree, optimizer, asdict(RECIPES[optimizer]) | changes)


def gap(left, right):
    """The largest relative distance between the updates of two runs, over all steps."""
    assert torch.isfinite(left).all()
    distances = (left - right).flatten(1).norm(dim=1)
    return (distances / left.flatten(1).norm(dim=1).max()).max().item()


@every_additive
@given(data=st.data(), shape=shapes(), seed=seeds, log_a=st.floats(-4, 4))
def test_the_transform_is_homogeneous_of_its_degree_and_no_other(cls, data, shape, seed, log_a):
    adapter, a = data.draw(adapters(cls)), 10.0**log_a
    factors = random_factors(adapter, random_weight(shape, seed), seed)
    scaled = adapter.transform({name: a * factor for name, factor in factors.items()}, shape)
    unscaled = adapter.transform(factors, shape)

    def off(degree):
        return ((scaled - a**degree * unscaled).norm() / scaled.norm()).item()

    degree = adapter.degree(shape)
    assert off(degree) < 1e-13
    if not 0.99 < a < 1.01:
        assert min(off(degree - 1), off(degree + 1)) > 1e-3


@every_additive
@every_optimizer
@settings(max_examples=12)
@given(data=st.data(), shape=shapes(), seed=seeds, gamma=gammas)
def test_the_rewritten_run_applies_the_same_updates(cls, optimizer, data, shape, seed, gamma):
    adapter = data.draw(adapters(cls))
    degree = adapter.degree(shape)
    changes = data.draw(st.sampled_from([{}, {"eps": 1e-8}, {"grad_clip": None, "lr": 1e-3}]))
    recipe = folded_back(gamma, degree, optimizer, **changes)
    moved = rewrite(gamma, degree, optimizer, asdict(recipe))
    _, with_gamma = train(adapter, shape, seed, gamma, optimizer, recipe)
    _, without = train(adapter, shape, seed, 1.0, optimizer, moved)
    assert gap(with_gamma, without) < BOUND


@every_additive
@every_optimizer
@settings(max_examples=8)
@given(data=st.data(), shape=shapes(), seed=seeds, power=st.integers(-4, 4))
def test_powers_of_two_agree_bit_for_bit(cls, optimizer, data, shape, seed, power):
    adapter = data.draw(adapters(cls))
    degree = adapter.degree(shape)
    gamma = 2.0 ** (power * degree)
    recipe = folded_back(gamma, degree, optimizer)
    moved = rewrite(gamma, degree, optimizer, asdict(recipe))
    with_gamma = train(adapter, shape, seed, gamma, optimizer, recipe, torch.float32)
    without = train(adapter, shape, seed, 1.0, optimizer, moved, torch.float32)
    assert is_power_of_two(scale(gamma, degree))
    assert torch.equal(with_gamma[0], without[0])
    assert torch.equal(with_gamma[1], without[1])


@every_additive
@pytest.mark.parametrize(
    ("optimizer", "setting"),
    [(name, setting) for name in POWERS for setting in ("init_scale", *POWERS[name])],
)
def test_a_setting_left_alone_changes_the_run(cls, optimizer, setting):
    adapter, shape, gamma = cls(), (16, 12), 0.03
    degree = adapter.degree(shape)
    recipe = folded_back(gamma, degree, optimizer)
    moved = rewrite(gamma, degree, optimizer, asdict(recipe))
    wrong = replace(moved, **{setting: getattr(recipe, setting)})
    _, with_gamma = train(adapter, shape, 0, gamma, optimizer, recipe)
    assert gap(with_gamma, train(adapter, shape, 0, 1.0, optimizer, moved)[1]) < BOUND
    off = gap(with_gamma, train(adapter, shape, 0, 1.0, optimizer, wrong)[1])
    start = adapter.init(random_weight(shape, 0), generator(0)).values()
    if setting == "init_scale" and not any(factor.any() for factor in start):
        assert off < BOUND  # native starts at zero, which has no scale
    else:
        assert off > DIFFERENT


@every_additive
@every_optimizer
@pytest.mark.parametrize("error", [-1, 1])
def test_a_wrong_degree_changes_the_run(cls, optimizer, error):
    adapter, shape, gamma = cls(), (16, 12), 0.03
    degree = adapter.degree(shape)
    if degree + error < 1:
        error = 2
    recipe = folded_back(gamma, degree, optimizer)
    wrong = rewrite(gamma, degree + error, optimizer, asdict(recipe))
    _, with_gamma = train(adapter, shape, 0, gamma, optimizer, recipe)
    assert gap(with_gamma, train(adapter, shape, 0, 1.0, optimizer, wrong)[1]) > DIFFERENT


def mounted_run(adapter, recipes, init_scale):
    """Losses of a two-layer model with mounted adapters, each layer with its own AdamW recipe."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 64))
        x, y = torch.randn(8, 12), torch.randn(8, 64)
    mounted = attach(model, adapter, recipes, seed=0, init_scale=init_scale)
    groups = [
        {
            "params": list(mounted.factors(name).values()),
            "lr": recipe.lr,
            "eps": recipe.eps,
            "weight_decay": recipe.weight_decay,
        }
        for name, recipe in recipes.items()
    ]
    running = torch.optim.AdamW(groups)
    losses = []
    for _ in range(STEPS):
        loss = (model(x) - y).square().mean()
        running.zero_grad()
        loss.backward()
        running.step()
        losses.append(loss.detach())
    return torch.stack(losses), {name: mounted.delta(name).detach() for name in recipes}


def test_mounted_layers_of_different_degree_need_a_rewrite_each():
    """LoKr: the first layer's right block is full (gamma is 1), the second's factored, degree 3."""
    with_gamma = ADAPTERS["lokr"](rank=2, alpha=2.0 * 2.0**-6, factor=4)
    without = replace(with_gamma, alpha=2.0)
    shapes = {"0": (16, 12), "2": (64, 16)}
    assert [with_gamma.degree(shape) for shape in shapes.values()] == [2, 3]

    recipe = Rewrite(init_scale=1.0, lr=0.02, eps=1e-3, weight_decay=0.1)
    moved = {
        name: rewrite(with_gamma.gamma(shape), with_gamma.degree(shape), "adamw", asdict(recipe))
        for name, shape in shapes.items()
    }
    losses, deltas = mounted_run(with_gamma, dict.fromkeys(shapes, recipe), 1.0)
    twin_losses, twin_deltas = mounted_run(without, moved, lambda name, _: moved[name].init_scale)
    assert losses[-1] < losses[0]
    assert torch.equal(losses, twin_losses)
    assert all(torch.equal(deltas[name], twin_deltas[name]) for name in shapes)

    one_for_all = dict.fromkeys(shapes, moved["2"])
    wrong_losses, _ = mounted_run(without, one_for_all, moved["2"].init_scale)
    assert not torch.allclose(losses, wrong_losses, rtol=1e-3)


@given(power=st.integers(-60, 60), degree=st.integers(1, 7))
def test_the_scale_is_exact_where_it_is_a_power_of_two(power, degree):
    s = scale(2.0 ** (power * degree), degree)
    assert s == 2.0**power
    assert is_power_of_two(s)


@given(gamma=gammas, degree=st.integers(1, 7))
def test_the_scale_is_the_root_of_gamma(gamma, degree):
    assert scale(gamma, degree) ** degree == pytest.approx(gamma, rel=1e-14)


@pytest.mark.parametrize("s", [0.0, -2.0, 3.0, 1.1, math.inf, math.nan])
def test_what_is_no_power_of_two(s):
    assert not is_power_of_two(s)


def test_the_exponents_and_a_rewrite_by_hand():
    assert [exponent(name) for name in ("sgd", "adam", "adamw")] == [2, 1, 1]
    hyper = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.25, "grad_clip": None}
    assert rewrite(0.25, 2, "adamw", hyper) == Rewrite(
        init_scale=0.5, lr=5e-4, eps=2e-8, weight_decay=0.5, grad_clip=None
    )
    assert rewrite(16.0, 4, "sgd", {"lr": 0.5, "weight_decay": 1.0, "init_scale": 3.0}) == Rewrite(
        init_scale=6.0, lr=2.0, weight_decay=0.25
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 2, "sgd", {"lr": 1.0}), "gamma must be finite and positive.*got 0.0"),
        ((-1.0, 2, "sgd", {"lr": 1.0}), "got -1.0"),
        ((math.inf, 2, "sgd", {"lr": 1.0}), "got inf"),
        ((0.5, 0, "sgd", {"lr": 1.0}), "degree.*integer >= 1, got 0"),
        ((0.5, 2, "adamv", {"lr": 1.0}), "not 'adamv' .did you mean 'adam"),
        ((0.5, 2, "sgd", {"lr": 1.0, "momentum": 0.9}), "not 'momentum'"),
        ((0.5, 2, "sgd", {"lr": 1.0, "weight_decai": 0.9}), "did you mean 'weight_decay'"),
        ((0.5, 2, "sgd", {"weight_decay": 0.1}), "needs the run's lr"),
        ((0.5, 2, "sgd", {"lr": 1.0, "init_scale": None}), "init_scale must be a number"),
    ],
)
def test_what_cannot_be_rewritten_says_why(arguments, message):
    with pytest.raises(UserError, match=message):
        rewrite(*arguments)
