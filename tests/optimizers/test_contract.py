"""What must hold for every optimizer. A new file in lyco_lab/optimizers/ is tested for free."""

import io
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lyco_lab.errors import UserError
from lyco_lab.optimizers import OPTIMIZERS, build, describe
from lyco_lab.optimizers.base import Group, Optimizer
from tests.optimizers.law import (
    STEPS,
    Walk,
    base_lr,
    gap,
    moved,
    off,
    rules,
    standard,
    values,
    walk,
)
from tests.strategies import seeds


def every(keep=lambda cls: True):
    kept = {name: cls for name, cls in OPTIMIZERS.items() if keep(cls)}
    return pytest.mark.parametrize("cls", kept.values(), ids=kept.keys())


every_optimizer = every()
moving = every(lambda cls: not cls.no_gamma)
averaging = every(lambda cls: cls.averages)

SCALES = st.floats(min_value=-3, max_value=3).map(lambda exponent: 10.0**exponent)
DTYPES = st.sampled_from([torch.float32, torch.float64])
POWERS_OF_TWO = st.integers(-10, 10).map(lambda exponent: 2.0**exponent)
BOUND = 1e-13  # of rounding in float64
COARSE = 0.05  # of rounding to the 8 bits of bfloat16 or of a code, over all steps
DIFFERENT = 1e-3


def test_seventeen_are_found():
    assert len(OPTIMIZERS) >= 17
    assert {"adam", "adamw8bit", "muon", "prodigy", "radam", "schedulefree"} <= OPTIMIZERS.keys()


@moving
@settings(max_examples=6)
@given(data=st.data(), s=SCALES, seed=seeds, steps=st.sampled_from([1, 2, STEPS]))
def test_steps_commute_with_scaling(cls, data, s, seed, steps):
    rule = data.draw(rules(cls))
    here = walk(rule, seed=seed).go(0, steps)
    there = moved(rule, s, seed=seed).go(0, steps)
    assert gap(here, there) < (COARSE if cls.coarse else BOUND)


@every(lambda cls: not cls.no_gamma and cls.exact)
@settings(max_examples=6)
@given(data=st.data(), dtype=DTYPES, s=POWERS_OF_TWO, seed=seeds)
def test_powers_of_two_keep_every_bit(cls, dtype, data, s, seed):
    rule = data.draw(rules(cls))
    (here,) = walk(rule, dtype=dtype, seed=seed).go(0, STEPS).values()
    (there,) = moved(rule, s, dtype=dtype, seed=seed).go(0, STEPS).values()
    assert torch.equal(here, there)


@pytest.mark.parametrize(
    ("cls", "setting"), [(cls, name) for cls in OPTIMIZERS.values() for name in cls.powers]
)
def test_every_power_is_needed_and_no_other_will_do(cls, setting):
    rule, s = standard(cls), 0.25  # a power of two: coarse optimizers agree as well
    here = walk(rule).go(0, STEPS)
    assert gap(here, moved(rule, s).go(0, STEPS)) < BOUND
    for power in {0, cls.powers[setting] - 1, cls.powers[setting] + 1} - {cls.powers[setting]}:
        lr, wrong = base_lr(cls) * s ** cls.powers.get("lr", 0), rule.scaled(s)
        if setting == "lr":
            lr = base_lr(cls) * s**power
        else:
            back = replace(wrong, **{setting: getattr(rule, setting)})
            wrong = back.moved({setting: s**power})
        there = walk(wrong, s, lr).go(0, STEPS)
        assert off(here, there) > DIFFERENT, f"{setting} may move by s**{power} as well"


@moving
def test_a_scaling_with_all_settings_left_alone_changes_the_run(cls):
    rule = standard(cls)
    assert off(walk(rule).go(0, STEPS), walk(rule, 0.25).go(0, STEPS)) > DIFFERENT


@every_optimizer
def test_powers_are_of_settings(cls):
    own = {spec.name for spec in fields(cls)}
    assert set(cls.powers) <= own | {"lr"}
    assert 0 not in cls.powers.values()
    assert bool(cls.no_gamma) != bool(cls.powers)


@every_optimizer
def test_every_setting_has_an_effect(cls):
    """And none is left out of the values that the other tests draw from."""
    rule = standard(cls)
    assert {spec.name for spec in fields(cls)} == values(cls).keys()
    (here,) = walk(rule).go(0, STEPS).values()
    for name, (_, other, *_) in values(cls).items():
        changed = walk(replace(rule, **{name: other})).go(0, STEPS)
        if cls.averages:
            kept = walk(rule).go(0, STEPS)
            kept.optimizer.eval(), changed.optimizer.eval()
            here = kept.values()[0]
        assert not torch.equal(here, changed.values()[0]), name


@every(lambda cls: not cls.one_scale)
@settings(max_examples=4)
@given(data=st.data(), seed=seeds)
def test_groups_move_as_if_they_were_alone(cls, data, seed):
    two = [data.draw(rules(cls)), data.draw(rules(cls))]
    lrs = [base_lr(cls), 0.5 * base_lr(cls)]
    together = Walk(two, lrs, [1.0, 1.0], torch.float32, seed).go(0, STEPS).values()
    for number, name in enumerate("ab"):
        alone = Walk([two[number]], [lrs[number]], [1.0], torch.float32, seed, [name])
        assert torch.equal(together[number], alone.go(0, STEPS).values()[0])


@every_optimizer
@settings(max_examples=6)
@given(data=st.data(), seed=seeds, done=st.integers(1, STEPS - 1))
def test_a_run_goes_on_bit_for_bit_from_what_was_saved(cls, data, seed, done):
    one = data.draw(rules(cls))
    two = one if cls.one_scale else data.draw(rules(cls))

    def begin():
        return Walk([one, two], [base_lr(cls)] * 2, [1.0, 1.0], torch.float32, seed)

    unbroken, file = begin().go(0, done), io.BytesIO()
    parameters = [p.detach().clone() for group in unbroken.groups for p in group]
    torch.save((unbroken.optimizer.state_dict(), parameters), file)
    file.seek(0)
    state, parameters = torch.load(file, weights_only=True)
    resumed = begin()
    with torch.no_grad():
        for parameter, saved in zip(sum(resumed.groups, []), parameters, strict=True):
            parameter.copy_(saved)
    resumed.optimizer.load_state_dict(state)
    unbroken.go(done, STEPS), resumed.go(done, STEPS)
    if cls.averages:
        unbroken.optimizer.eval(), resumed.optimizer.eval()
    for here, there in zip(unbroken.values(), resumed.values(), strict=True):
        assert torch.equal(here, there)


@averaging
@settings(max_examples=6)
@given(data=st.data(), seed=seeds, done=st.integers(2, STEPS - 1), s=POWERS_OF_TWO)
def test_looking_at_the_average_changes_nothing(cls, data, seed, done, s):
    rule = data.draw(rules(cls))
    unseen = walk(rule, dtype=torch.float32, seed=seed).go(0, done)
    seen = moved(rule, s, dtype=torch.float32, seed=seed).go(0, done)
    for walked in (unseen, seen):
        walked.optimizer.train()  # already so
    seen.optimizer.eval()
    seen.optimizer.eval()
    average = seen.values()[0]
    seen.optimizer.train()
    assert torch.equal(seen.values()[0], unseen.values()[0])
    seen.go(done, STEPS), unseen.go(done, STEPS)
    assert torch.equal(seen.values()[0], unseen.values()[0])
    assert not torch.equal(average, seen.values()[0])
    seen.optimizer.eval(), unseen.optimizer.eval()
    assert torch.equal(seen.values()[0], unseen.values()[0])


@averaging
def test_the_average_is_not_what_trains(cls):
    trained, used = walk(standard(cls)).go(0, STEPS), walk(standard(cls)).go(0, STEPS)
    used.optimizer.eval()
    assert DIFFERENT < off(trained, used) < 1


@every(lambda cls: not cls.averages)
def test_what_trains_is_used_unless_said_otherwise(cls):
    assert not hasattr(walk(standard(cls)).optimizer, "eval")


@every_optimizer
def test_gradients_of_zero_harm_nothing(cls):
    """A factor whose partner starts at zero has them at the first step."""
    rule = cls()
    factors = [nn.Parameter(torch.randn(shape)) for shape in [(4, 3), (65, 64)]]
    optimizer = rule.build([Group("a", factors, base_lr(cls), rule)])
    for size in (0.0, 0.0, 1.0):
        for factor in factors:
            factor.grad = size * torch.randn(factor.shape)
        optimizer.step()
        assert all(factor.isfinite().all() for factor in factors)


@every_optimizer
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (4, 3, 2), (4, 3, 2, 2)])
def test_any_factor_is_trained_or_refused_at_once(cls, shape):
    rule, factor = cls(), nn.Parameter(torch.ones(shape))
    groups = [Group("unet", [factor], base_lr(cls), rule)]
    if reason := rule.accepts(factor):
        with pytest.raises(UserError, match="unet") as caught:
            rule.build(groups)
        assert reason in str(caught.value)
    else:
        optimizer = rule.build(groups)
        for _ in range(12):  # RAdam's first steps may be left out
            factor.grad = torch.ones(shape)
            optimizer.step()
        assert (factor < 1).all()


@every_optimizer
@given(data=st.data())
def test_settings_survive_being_written_down(cls, data):
    rule = data.draw(rules(cls))
    assert build(describe(rule)) == rule
    assert hash(rule) == hash(build(describe(rule)))


@every_optimizer
def test_bad_settings_are_errors_of_one_line(cls):
    for name, (first, *_) in values(cls).items():
        default = getattr(cls, name)
        if isinstance(default, bool):
            continue  # typed where it is read
        if isinstance(default, str):
            bad = ["orignal"]
        elif isinstance(default, tuple):
            bad = [(math.nan, first[1]), (first[0], math.inf), (-1.0, first[1]), (0.5,), "x", None]
        else:
            bad = [math.nan, math.inf, "x", (first, first), -1.0 if (first or 1) > 0 else 1.0]
        for value in bad:
            with pytest.raises(UserError) as caught:
                cls(**{name: value})
            message = str(caught.value)
            assert name in message and "\n" not in message
            assert cls.__name__.lower() in message


@pytest.mark.parametrize(
    ("kind", "module"),
    [("prodigy", "prodigyopt"), ("schedulefree", "schedulefree"), ("adamw8bit", "bitsandbytes")],
)
def test_a_package_that_is_missing_is_named_with_its_remedy(kind, module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    rule = OPTIMIZERS[kind]()
    with pytest.raises(UserError, match=rf"pip install 'lyco-lab\[optimizers\]'.*{module}"):
        rule.build([Group("a", [nn.Parameter(torch.ones(2, 2))], 1.0, rule)])


@every_optimizer
def test_a_closure_is_evaluated_with_gradients(cls):
    """Lightning gives one to every step."""
    rule, factor = cls(), nn.Parameter(torch.ones(4, 3))
    optimizer = rule.build([Group("a", [factor], base_lr(cls), rule)])

    def closure():
        optimizer.zero_grad()
        loss = factor.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(12)]
    assert losses[0] == 12.0 and losses[-1] < 12.0


def test_the_base_class_is_not_a_kind():
    assert Optimizer not in OPTIMIZERS.values()
