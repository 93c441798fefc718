"""Runs that are the same run: rewriting, representatives and classes, on whole configurations.

That equivalent runs train the same weights is checked by training them: here for scales drawn at
random, in tests/train/test_stage.py, tests/verify and, on bare factors, in tests/optimizers.
"""

import csv
import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lyco_lab.adapters import ADAPTERS, describe
from lyco_lab.adapters.options import Options
from lyco_lab.config import Data, Model, Run, Train
from lyco_lab.config.groups import Group, group_of
from lyco_lab.data.stage import prepare
from lyco_lab.errors import UserError
from lyco_lab.gamma import (
    canonical,
    classes,
    equivalent,
    is_power_of_two,
    layers,
    out_of_range,
    rewrite,
    scale,
    transformed,
)
from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.record import Record
from lyco_lab.train import train

gammas = st.floats(min_value=-4, max_value=4).map(lambda exponent: 10.0**exponent)
# Small ranks and a factor of 8: on the narrow layers of the tiny model LoKr then mixes degrees.
KINDS = {
    "lora": {"rank": 2, "alpha": 1.5},
    "loha": {"rank": 2, "alpha": 3.0},
    "lokr": {"rank": 4, "alpha": 0.5, "factor": 8},
    "glora": {"rank": 2, "alpha": 0.3},
    "tlora": {"rank": 2, "alpha": 0.3},
    "dylora": {"rank": 4, "alpha": 3.0, "block_size": 2},
    "dora": {"of": {"kind": "loha", "rank": 2, "alpha": 0.7}},
    "ia3": {"alpha": 0.7},
    "native": {"alpha": 0.7, "bias": True},
}
MOVABLE = sorted(name for name, cls in OPTIMIZERS.items() if not cls.no_gamma and not cls.one_scale)


def a_run(path, kind="lora", optimizer="adamw", name="a", preset="attn-mlp", **settings):
    text, norms = settings.pop("text_encoder", False), settings.pop("train_norm", False)
    options = settings.pop("options", Options())
    return Run(
        name=name,
        study="s",
        model=Model(path=str(path), preset=preset, text_encoder=text, train_norm=norms),
        data=Data(folder="x"),
        adapter={"kind": kind, **KINDS.get(kind, {})},
        options=options,
        optimizer=optimizer if isinstance(optimizer, dict) else {"kind": optimizer},
        train=Train(**{"lr": 3e-3, "grad_clip": 0.7} | settings),
    )


GROUPS = (
    Group(factors=("b*",), lr=16.0),
    Group(layers=("unet.*attn2*",), init_scale=0.5, lr=3.0, clip=2.0),
)


@st.composite
def runs(draw, path):
    kind = draw(st.sampled_from(sorted(KINDS)))
    product = kind in ("lora", "loha", "lokr")
    groups = draw(st.sampled_from([(), GROUPS[1:], GROUPS if product else ()]))
    scalar = product and draw(st.booleans())
    return a_run(
        path,
        kind,
        draw(st.sampled_from(MOVABLE)),
        text_encoder=draw(st.booleans()),
        train_norm=not scalar and draw(st.booleans()),
        options=Options(use_scalar=scalar),
        init_scale=draw(st.sampled_from([1.0, 0.3, 4.0])),
        grad_clip=draw(st.sampled_from([None, 0.7])),
        groups=groups,
    )


def gammas_of(run):
    """Of the adapter's layers; norms beside it have 1 always."""
    assert {layer.gamma for layer in layers(run) if layer.beside} <= {1.0}
    return {layer.gamma for layer in layers(run) if not layer.beside}


def renamed(run, name="b", **settings):
    return dataclasses.replace(run, name=name, **settings)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data(), gamma=gammas, carry=st.sampled_from(["all", "zero"]))
def test_a_rewritten_run_has_that_gamma_and_is_equivalent(tiny_sd, data, gamma, carry):
    run = data.draw(runs(tiny_sd))
    has_zero = run.adapter["kind"] != "tlora" or run.options.use_scalar
    carry = carry if has_zero else "all"
    moved = rewrite(run, gamma, carry=carry)
    assert all(found == pytest.approx(gamma, rel=1e-12) for found in gammas_of(moved))
    assert equivalent(run, moved) and equivalent(moved, run)
    again = rewrite(moved, 1.0)
    assert equivalent(run, again)
    starts = {layer.name for layer in layers(run) for t in layer.terms if len(t) > 1}
    if carry == "zero" and starts:
        assert moved.train.init_scale == run.train.init_scale or moved.train.groups


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(data=st.data(), power=st.integers(-2, 2))
def test_powers_of_two_go_there_and_back_in_every_bit(tiny_sd, data, power):
    run = rewrite(data.draw(runs(tiny_sd)), 1.0)
    gamma = 2.0 ** (12 * power)  # of the degrees 1 to 4 and 6 every root is a power of two
    run = dataclasses.replace(
        run, options=Options(), train=dataclasses.replace(run.train, groups=())
    )
    there = rewrite(run, gamma)
    assert equivalent(run, there).bitwise
    back = rewrite(there, 1.0)
    assert {key: value for key, value in back.to_dict().items() if key != "train"} == {
        key: value for key, value in run.to_dict().items() if key != "train"
    }
    assert equivalent(back, run).bitwise


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(data=st.data(), gamma=gammas)
def test_equivalent_runs_have_one_representative(tiny_sd, data, gamma):
    run = data.draw(runs(tiny_sd))
    first, second = canonical(run), canonical(rewrite(run, gamma))
    assert gammas_of(first) == {1.0}
    assert equivalent(first, second)
    assert equivalent(canonical(first), first)
    assert first.train.lr == pytest.approx(second.train.lr, rel=1e-9)
    assert first.train.init_scale == pytest.approx(second.train.init_scale, rel=1e-9)
    if first.train.grad_clip is not None:
        assert first.train.grad_clip == pytest.approx(second.train.grad_clip, rel=1e-9)
    assert [(g.layers, g.factors) for g in first.train.groups] == [
        (g.layers, g.factors) for g in second.train.groups
    ]


SETTINGS = {  # each on its own makes another run of any optimizer's and adapter's
    "lr": {"lr": 4e-3},
    "the weight in the clipped norm": {"grad_clip": 0.8},
    "lr of": {"init_scale": 1.1},  # which the zero factor carries: its learning rate
    "train.steps": {"steps": 299},
    "train.grad_clip is set": {"grad_clip": None},
    "train.warmup_steps": {"warmup_steps": 3},
}


@pytest.mark.parametrize("kind", ["lora", "lokr", "glora"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_differs_is_named(tiny_sd, kind, setting):
    run = rewrite(a_run(tiny_sd, kind), 0.3)
    other = renamed(run, train=dataclasses.replace(run.train, **SETTINGS[setting]))
    verdict = equivalent(canonical(run), other)
    assert not verdict and not verdict.bitwise
    assert setting in verdict.reason and "in b" in verdict.reason


@pytest.mark.parametrize("name", MOVABLE)
def test_each_setting_that_should_move_must(tiny_sd, name):
    rule = OPTIMIZERS[name]()
    run = a_run(tiny_sd, optimizer=name)
    moved = rewrite(run, 0.3)
    assert equivalent(run, moved)
    for key in ("lr", *(field.name for field in dataclasses.fields(rule))):
        if not rule.powers.get(key) or key != "lr" and not getattr(rule, key):
            continue
        if key == "lr":
            wrong = renamed(moved, train=dataclasses.replace(moved.train, lr=run.train.lr))
        else:
            wrong = renamed(moved, optimizer=moved.optimizer | {key: run.optimizer[key]})
        verdict = equivalent(run, wrong)
        assert not verdict
        # Each differs for every factor; the first found may be lr, from which decay is told apart.
        assert key in verdict.reason


def test_a_start_at_zero_has_no_scale(tiny_sd):
    one, other = a_run(tiny_sd, "native"), a_run(tiny_sd, "native", init_scale=3.0)
    assert equivalent(one, other).bitwise


def test_gamma_on_the_factor_that_starts_at_zero_is_a_ratio_of_learning_rates(tiny_sd):
    run = rewrite(a_run(tiny_sd, groups=(), grad_clip=None), 1.0)
    moved = {"eps": 1 / 16, "weight_decay": 1 / 16}
    ratio = Group(factors=("b_PR",), lr=16.0, optimizer=moved)
    plus = renamed(run, train=dataclasses.replace(run.train, groups=(ratio,)))
    assert not equivalent(run, plus)
    assert equivalent(rewrite(run, 1 / 16, carry="zero"), run).bitwise
    gamma_16 = dataclasses.replace(run, adapter=describe(run.adapter_value().with_gamma(16.0)))
    assert equivalent(gamma_16, plus).bitwise
    sgd = dataclasses.replace(gamma_16, optimizer={"kind": "sgd", "weight_decay": 0.0})
    (group,) = rewrite(sgd, 1.0, carry="zero").train.groups or (None,)
    assert group.factors == ("a_RQ",) or group.lr == 256.0


def test_layers_of_different_degree_get_groups(tiny_sd):
    run = a_run(tiny_sd, "lokr")
    degrees = {len(term) for layer in layers(run) for term in layer.terms}
    assert len(degrees) > 1
    moved = rewrite(run, 2.0**-12)
    assert moved.train.groups and equivalent(run, moved)
    prodigy = a_run(tiny_sd, "lokr", optimizer="prodigy")
    with pytest.raises(UserError, match="Prodigy takes one for all"):
        rewrite(prodigy, 2.0**-12)
    assert canonical(prodigy) == prodigy


@pytest.mark.parametrize("kind", ["lora", "lokr", "native"])
@pytest.mark.parametrize("carry", ["all", "zero"])
def test_norms_beside_the_adapter_stay_as_they_are(tiny_sd, kind, carry):
    run = a_run(tiny_sd, kind, train_norm=True, preset="full", groups=())
    beside = [layer for layer in layers(run) if layer.beside]
    assert {(layer.terms, layer.others) for layer in beside} == {((("dw",),), ("bias",))}
    moved = rewrite(run, 2.0**-12, carry=carry)
    verdict = equivalent(moved, run)
    assert verdict
    for layer in beside:
        for factor in layer.factors:
            place = (layer.name, factor)
            assert verdict.scales[place] == 1.0
            ours, theirs = (group_of(r.train.groups, *place) for r in (run, moved))
            assert moved.train.lr * theirs.lr == pytest.approx(run.train.lr * ours.lr, rel=1e-12)
    without = renamed(run, model=dataclasses.replace(run.model, train_norm=False))
    assert "model.train_norm is" in equivalent(run, without).reason
    with pytest.raises(UserError, match="Prodigy takes one for all"):
        rewrite(renamed(run, optimizer={"kind": "prodigy"}), 2.0**-12)


def test_groups_that_names_of_factors_tell_apart_list_no_layers(tiny_sd):
    moved = rewrite(a_run(tiny_sd, "lora", train_norm=True, preset="full", groups=()), 2.0**-12)
    (group,) = moved.train.groups
    assert (group.layers, group.factors) == (("*",), ("dw", "bias"))


def test_an_optimizer_of_one_scale_moves_where_one_is_enough(tiny_sd):
    run = a_run(tiny_sd, "loha", optimizer="prodigy", lr=1.0)
    moved = rewrite(run, 2.0**-8)
    assert not moved.train.groups and equivalent(run, moved)
    assert gammas_of(canonical(moved)) == {1.0} and equivalent(canonical(run), canonical(moved))
    with pytest.raises(UserError, match="takes one for all"):
        rewrite(run, 2.0**-8, carry="zero")


@pytest.mark.parametrize(
    ("kind", "optimizer", "options", "message"),
    [
        ("oft", "adamw", {}, "not homogeneous"),
        ("boft", "adamw", {}, "not homogeneous"),
        ("lora", "adamw", {"gamma": 0.0}, "finite and positive, got 0.0"),
        ("lora", "adamw", {"gamma": math.inf}, "got inf"),
        ("lora", "adamw", {"carry": "zeros"}, "one of all, zero"),
        ("tlora", "adamw", {"carry": "zero"}, "a term without any"),
    ],
)
def test_what_cannot_be_rewritten_says_why(tiny_sd, kind, optimizer, options, message):
    with pytest.raises(UserError, match=message):
        rewrite(a_run(tiny_sd, kind, optimizer=optimizer), **options)


@pytest.mark.parametrize("kind", ["oft", "lora"])
def test_where_nothing_moves_a_run_is_equivalent_to_itself_alone(tiny_sd, kind, monkeypatch):
    monkeypatch.setattr(OPTIMIZERS["lion"], "no_gamma", "it forgets", raising=True)
    run = a_run(tiny_sd, kind, optimizer="lion")
    with pytest.raises(UserError, match="Lion admits no .* it forgets|not homogeneous"):
        rewrite(run)
    assert canonical(run) == run
    assert equivalent(run, renamed(run)).bitwise
    other = renamed(run, train=dataclasses.replace(run.train, lr=1e-4))
    assert not equivalent(run, other)


def test_classes_partition_runs_by_what_they_train(tiny_sd):
    lora, lokr, oft = (a_run(tiny_sd, kind, name=kind) for kind in ("lora", "lokr", "oft"))
    mixed = [
        lora,
        oft,
        renamed(rewrite(lora, 0.3), "lora-2"),
        lokr,
        renamed(rewrite(lokr, 2.0**-12 * 0.25), "lokr-2"),
        renamed(rewrite(lora, 0.75 * 2.0**-8), "lora-3"),
        renamed(lora, "lora-other", train=dataclasses.replace(lora.train, lr=1.0)),
        renamed(lora, "lora-seed", seed=1),
    ]
    found = [[run.name for run in c.runs] for c in classes(mixed)]
    assert found == [
        ["lora", "lora-2", "lora-3"],
        ["oft"],
        ["lokr", "lokr-2"],
        ["lora-other"],
        ["lora-seed"],
    ]
    assert not classes(mixed)[0].bitwise
    assert classes([lora, mixed[5]])[0].bitwise  # 0.75 = 1.5 / 2, as lora has it


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_any_scales_that_multiply_to_gamma_train_the_same_weights(
    tiny_sd, tiny_concept, tmp_path, kind
):
    """The gauge theorem on the code that trains: powers of two, factor by factor, bit for bit."""
    data = Data(folder=str(tiny_concept))
    quick = {"steps": 4, "warmup_steps": 2, "grad_clip": 2.0**-7, "lr": 2.0**-6}
    run = dataclasses.replace(a_run(tiny_sd, kind, **quick), data=data)
    exponents = iter([3, -2, 1, 4, -1, 2, -3] * 1000)
    scales = {}
    for layer in layers(run):
        for term in layer.terms:
            powers = [next(exponents) for _ in term[1:]]
            for name, power in zip(term, [-sum(powers), *powers], strict=True):
                scales[layer.name, name] = 2.0**power
    moved = transformed(run, scales, run.adapter_value())
    assert moved.train.groups and equivalent(run, moved).bitwise
    losses = [trained(each, tmp_path / str(n)) for n, each in enumerate((run, moved))]
    assert losses[0] == losses[1]
    assert len({loss for loss, _ in losses[0]}) > 1


def trained(run, place):
    """The losses and norms of a run, step by step."""
    record = Record.open(place, run)
    prepare(run, record)
    train(run, record)
    with (record.path / "train" / "metrics.csv").open(newline="") as file:
        return [(row["loss"], row["delta_norm"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_copies_that_are_scaled_otherwise_agree_to_rounding(
    tiny_sd, tiny_concept, tmp_path, alike, wrapped
):
    """T-LoRA subtracts P0 from P: the same bits only if both have one scale."""
    data = Data(folder=str(tiny_concept))
    quick = {"steps": 3, "warmup_steps": 1, "lr": 2.0**-6}
    run = dataclasses.replace(a_run(tiny_sd, "tlora", **quick), data=data)
    if wrapped:
        run = dataclasses.replace(run, adapter={"kind": "dora", "of": run.adapter})
    p, q = ("p*", "q*") if alike else ("p_PR", "q_RQ")
    moved = dataclasses.replace(
        run,
        name="b",
        train=dataclasses.replace(
            run.train,
            groups=tuple(
                Group(factors=(factor,), init_scale=s, lr=s, clip=s,
                      optimizer={"eps": 1 / s, "weight_decay": 1 / s})
                for factor, s in ((p, 2.0), (q, 0.5))
            ),
        ),
    )  # fmt: skip
    verdict = equivalent(run, moved)
    assert verdict.equal and verdict.bitwise is alike
    losses = [trained(each, tmp_path / each.name) for each in (run, moved)]
    assert (losses[0] == losses[1]) is alike


@pytest.mark.parametrize("setting", [{"devices": 2}, {"accelerator": "gpu"}])
@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_other_devices_add_up_in_another_order(tiny_sd, setting, kind):
    run = a_run(tiny_sd, kind)
    train = dataclasses.replace(run.train, batch_size=4)
    run = dataclasses.replace(run, train=train)
    other = renamed(run, trainer=dataclasses.replace(run.trainer, **setting))
    ((key, value),) = setting.items()
    for pair in ((run, other), (rewrite(run, 2.0**-12) if kind == "lora" else run, other)):
        verdict = equivalent(*pair)
        assert verdict.equal and not verdict.bitwise
        assert f"rounding of sums: trainer.{key} is " in verdict.reason
        assert repr(value) in verdict.reason
    (found,) = classes([run, other])
    assert not found.bitwise
    assert equivalent(other, renamed(other)).bitwise


@pytest.mark.parametrize(
    ("kind", "gamma", "carry", "inside"),
    [
        ("lora", 2.0**-46, "all", True),
        ("lora", 2.0**-50, "all", False),
        ("lora", 2.0**24, "zero", True),
        ("lora", 2.0**-25, "zero", False),
        ("native", 2.0**24, "all", True),
        ("native", 2.0**-25, "all", False),
        ("loha", 2.0**-52, "all", False),  # of scales that are small
        ("loha", 2.0**-48, "all", True),
    ],
)
def test_nothing_is_claimed_out_of_the_range_of_float32(tiny_sd, kind, gamma, carry, inside):
    run = rewrite(a_run(tiny_sd, kind, groups=()), 1.0)
    moved = renamed(rewrite(run, gamma, carry=carry))
    verdict = equivalent(run, moved)
    assert verdict.equal is inside and bool(out_of_range(moved)) is not inside
    if inside:
        assert verdict.bitwise
    else:
        assert "nothing is claimed" in verdict.reason and "of float32" in verdict.reason
    assert equivalent(moved, renamed(moved, "c")).bitwise  # nothing is scaled


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 2), "gamma must be finite and positive.*got 0.0"),
        ((-1.0, 2), "got -1.0"),
        ((math.inf, 2), "got inf"),
        ((0.5, 0), "degree.*integer >= 1, got 0"),
        ((0.5, True), "degree.*integer >= 1, got True"),
    ],
)
def test_a_scale_needs_a_positive_gamma_and_a_degree(arguments, message):
    with pytest.raises(UserError, match=message):
        scale(*arguments)


def test_all_kinds_with_a_gamma_are_tried():
    movable = {
        k for k, cls in ADAPTERS.items() if cls.takes == "matrix" and k not in ("oft", "boft")
    }
    assert movable == set(KINDS)
