"""What is declared beside a setting holds wherever a run is built."""

import dataclasses
import json
import math
import os
import typing

import pytest

from lyco_lab import settings, tracking
from lyco_lab.adapters import ADAPTERS
from lyco_lab.config import Data, Model, Run, Train, Trainer, load_study
from lyco_lab.config.compose import SECTIONS
from lyco_lab.config.groups import Group
from lyco_lab.config.training import Plugin
from lyco_lab.errors import UserError
from lyco_lab.files import cell
from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.verify.case import parse_gamma

CLASSES = {
    **SECTIONS,
    **{f"adapter {kind}": cls for kind, cls in ADAPTERS.items()},
    **{f"optimizer {kind}": cls for kind, cls in OPTIMIZERS.items()},
    "train groups": Group,
    "": Run,
}
ABSURD = (-(10**31), -1e300, 10**31, 1e300, 10**400, math.inf, -math.inf, math.nan)
LARGE = (9 * 10**18, 10**20)  # of numbers that count


ABSURD_TEXT = repr(10**400)  # no number any more


def numeric(hint):
    """Whether a number may be in a value of this type."""
    inner = typing.get_args(hint)
    return hint in (int, float) or any(map(numeric, inner))


def number_settings():
    for title, cls in CLASSES.items():
        for name, hint in settings.types_of(cls).items():
            if name in {spec.name for spec in dataclasses.fields(cls)} and numeric(hint):
                yield title, cls, name, hint


NUMBERS = list(number_settings())


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    text = "question: Q?\nexpectation: E.\nset: {data: {folder: x}}\n"
    (folder / "study.yaml").write_text(text)
    return folder


def spelled(number):
    words = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}
    return words.get(repr(number), repr(number))


@pytest.mark.parametrize(
    ("title", "cls", "name", "hint"), NUMBERS, ids=[f"{t}.{n}" for t, _, n, _ in NUMBERS]
)
def test_no_absurd_number_passes(study, title, cls, name, hint):
    within = settings.within(cls, name)
    assert within is not None, "a number without a range"
    section, _, kind = title.partition(" ")
    key = f"{section}.{name}".lstrip(".")
    for number in (*ABSURD, *LARGE * (int in typing.get_args(hint) + (hint,))):
        value = spelled(number)
        if kind == "groups":
            inner = f"{name}: {{eps: {value}}}" if name == "optimizer" else f"{name}: {value}"
            words, key = [f"train.groups=[{{{inner}}}]"], f"train.groups[1].{name}"
        else:
            tuples = [t for t in (hint, *typing.get_args(hint)) if typing.get_origin(t) is tuple]
            length = len(typing.get_args(tuples[0])) if tuples else 1
            listed = f"[{', '.join([value] * length)}]" if length > 1 else value
            words = [f"{section}.kind={kind}"] * bool(kind) + [f"{key}={listed}"]
        with pytest.raises(UserError) as caught:
            load_study(study, words)
        said = str(caught.value)
        assert "the command line" in said
        assert key in said or value == ABSURD_TEXT
        assert within.words in said or "whole number" in said or value == ABSURD_TEXT


def test_a_run_that_is_built_in_python_is_checked_too():
    with pytest.raises(UserError, match=r"train\.steps is 1000000000000, needs a number from 1"):
        Run(name="r", study="s", data=Data(concept="kael"), train=Train(steps=10**12))
    with pytest.raises(UserError, match=r"adapter\.of\.alpha is 1e\+300"):
        of = {"kind": "lora", "alpha": 1e300}
        Run(name="r", study="s", data=Data(concept="kael"), adapter={"kind": "dora", "of": of})
    group = Group(optimizer={"eps": 1e29})
    with pytest.raises(UserError, match=r"train\.groups\[1\] makes optimizer\.eps is 1e\+31"):
        Run(
            name="r", study="s", data=Data(concept="kael"), train=Train(groups=(group,)),
            optimizer={"kind": "adamw", "eps": 100.0},
        )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_the_warm_up_of_a_short_run_is_half_of_it_unless_it_is_given(study, steps):
    (run,) = load_study(study, [f"train.steps={steps}"]).runs
    assert run.train.warmup_steps == steps // 2 == run.to_dict()["train"]["warmup_steps"]
    with pytest.raises(UserError, match=f"warmup_steps < steps = {steps}"):
        load_study(study, [f"train.steps={steps}", "train.warmup_steps=20"])


def test_the_warm_up_of_any_other_run_is_as_it_was(study):
    for steps in (21, 300):
        (run,) = load_study(study, [f"train.steps={steps}"]).runs
        (given,) = load_study(study, [f"train.steps={steps}", "train.warmup_steps=20"]).runs
        assert run.train.warmup_steps == 20 and run.hash == given.hash


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["embedding.token=" + "a" * 300, "embedding.init=cat"], ["at most 64 characters"]),
        (["data.folder=" + "a" * 300], ["data.folder is", "255 in each part"]),
        (["model.path=" + "a/" * 3000], ["model.path is", "4,095 bytes"]),
        (["data.prefix=" + "a" * 20000], ["at most 10,000"]),
        (["wandb.project=team/project"], ["none of them /", "WANDB_ENTITY"]),
        (["wandb.project=" + "a" * 140], ["at most 128 characters"]),
        (["train.groups=[{optimizer: {lr: 2}}]"], ["optimizer.lr", "beside `optimizer`"]),
        (["data.buckets=3"], ["a list of three whole numbers, as [320, 960, 64]"]),
        (["train.learning_rate=1"], ["did you mean 'train.lr'?"]),
        (["optimizer.kind=adamw8"], ["did you mean 'adamw8bit' or 'adamw'?"]),
        (["train.steps=30", "train.warmup_steps=40"], ["40", "in the command line"]),
        (["train.lr=${oc.env:HOME}"], ["outside of the study", '"train.lr=$HOME"']),
        (["data.prefix=${data.prefix}"], ["leads back to itself"]),
        (["data.prefix=${train}"], ["no file gives"]),
        (["options.dropout=1"], ["options.dropout is 1.0, needs", "the command line"]),
        (["data.prefix=x${data}"], ["leads back to itself"]),
        (["data.prefix=x${optimizer}", "optimizer.eps=1"], ["which is no text, into text"]),
        (["data.prefix=${a b}"], ["is no reference"]),
        (["data.prefix=${data.folder"], ["does not close it"]),
        (["train.steps=???"], ["train.steps is '???'"]),
        (["x" + ".x" * 5000 + "=1"], ["unknown key"]),
    ],
)
def test_what_is_said_of_settings_that_cannot_be(study, words, parts):
    with pytest.raises(UserError) as caught:
        load_study(study, words)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_value_check_names_the_layers_that_its_settings_come_from(study):
    (study / "study.yaml").write_text(
        "question: Q?\nexpectation: E.\nset: {data: {folder: x}, train: {warmup_steps: 40}}\n"
    )
    with pytest.raises(UserError) as caught:
        load_study(study, ["train.steps=30"])
    assert f"in {study}/study.yaml (set)" in str(caught.value)
    with pytest.raises(UserError, match=r"needs betas\[0\] > 0.*, in the command line"):
        words = ["train.steps=99", "optimizer.kind=schedulefree", "optimizer.betas=[0, 0.9]"]
        load_study(study, words)


BOMBS = {
    "laughs": "x:\n- &a0 [l]\n"
    + "".join(f"- &a{i} [{f'*a{i - 1}, ' * 10}]\n" for i in range(1, 15)),
    "merged": "x:\n- &a0 {l: 1}\n"
    + "".join(f"- &a{i} {{<<: [{f'*a{i - 1}, ' * 10}]}}\n" for i in range(1, 15)),
    "itself": "x: &a [*a]\n",
    "nested": "x: " + "[" * 100_000,
    "deep": "x: " + "[" * 60 + "]" * 60,
    "tagged": "x: !!python/object/apply:os.system [ls]\n",
    "digits": "seed: 1" + "0" * 5000 + "\n",
    "strange": "x: \0\n",
    "key": "? [a, b]\n: 1\n",
}


REASONS = {
    "laughs": "values and characters",
    "merged": "values and characters",
    "itself": "holds itself",
    "nested": "nested more than 50 deep",
    "deep": "nested more than 50 deep",
    "tagged": "has the tag",
    "digits": "no decimal number",
    "strange": "not valid YAML",
    "key": "is a list or a mapping",
}


@pytest.mark.parametrize("bomb", sorted(BOMBS))
def test_a_file_that_would_not_end_is_refused_at_once(study, bomb):
    (study / "study.yaml").write_text(BOMBS[bomb])
    with pytest.raises(UserError, match=REASONS[bomb]) as caught:
        load_study(study)
    assert "study.yaml" in str(caught.value) and len(str(caught.value)) < 700


def test_references_do_not_grow_without_end(study):
    arguments = f"{{l0: {'x' * 100}, " + ", ".join(
        f"l{i}: '${{.l{i - 1}}}${{.l{i - 1}}}'" for i in range(1, 60)
    )
    lists = "{l0: [x, x], " + ", ".join(
        f"l{i}: ['${{..l{i - 1}}}', '${{..l{i - 1}}}']" for i in range(1, 40)
    )
    for inner, part in ((arguments, "more than 10,000"), (lists, "values and characters")):
        word = f"trainer.callbacks=[{{class_path: a.B, init_args: {inner}}}}}]"
        with pytest.raises(UserError, match=part):
            load_study(study, [word])


def test_a_grid_has_an_end(study):
    text = (study / "study.yaml").read_text()
    grid = ", ".join(f"{key}: [{', '.join(map(str, range(1, 100)))}]" for key in
                     ("seed", "train.steps", "generate.seed", "data.repeats"))  # fmt: skip
    (study / "study.yaml").write_text(text + f"grid: {{{grid}}}\n")
    with pytest.raises(UserError, match="96,059,601 runs"):
        load_study(study)


@pytest.mark.parametrize("place", ["/dev/zero", "/proc/self", "fifo", "x\0y", "a" * 10**5])
def test_a_base_is_a_regular_file(study, tmp_path, place):
    if place == "fifo":
        os.mkfifo(tmp_path / "fifo")
        place = str(tmp_path / "fifo")
    text = (study / "study.yaml").read_text()
    quoted = place.replace("\0", "\\0")
    (study / "study.yaml").write_text(text + f'base: "{quoted}"\n')
    with pytest.raises(UserError, match="base|cannot read") as caught:
        load_study(study)
    assert len(str(caught.value)) < 700


# Outside of this machine


def test_only_the_last_part_of_a_path_leaves_this_machine():
    plugin = {"class_path": "a.B", "init_args": {"dir": ["/home/me/x"], "also": {"y": "~/me/y"}}}
    data = {"folder": "/home/me/f", "prior": "/home/me/p", "prefix": "/home is not a path"}
    train = Train(validate_every=9, validation_folder="/home/me/v")
    model = Model(path="/home/me/sd", tokenizer="/home/me/clip")
    trainer = Trainer(callbacks=(Plugin(**plugin),))
    run = Run(name="r", study="s", data=Data(**data), train=train, model=model, trainer=trainer)
    for cls in (*SECTIONS.values(), Run):  # no path is without its mark
        for name in settings.types_of(cls):
            likely = any(part in name for part in ("path", "folder", "file", "dir", "toml"))
            if (
                likely
                and name != "bad_files"
                and name in {spec.name for spec in dataclasses.fields(cls)}
            ):
                assert settings.is_path(cls, name), name
    shown = tracking.described(run, {})
    assert "/home/me" not in json.dumps(shown) and "~/" not in json.dumps(shown)
    assert shown["model"]["path"] == "sd" and shown["model"]["tokenizer"] == "clip"
    assert shown["data"]["prior"] == "p" and shown["data"]["folder"] == "f"
    assert shown["data"]["prefix"] == data["prefix"]
    assert shown["train"]["validation_folder"] == "v"
    assert shown["trainer"]["callbacks"][0]["init_args"] == {"dir": ["x"], "also": {"y": "y"}}
    toml = Run(name="r", study="s", data=Data(toml="/home/me/d.toml"))
    assert tracking.described(toml, {})["data"]["toml"] == "d.toml"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("=1+1", "'=1+1"), ("@x", "'@x"), ("+a", "'+a"), ("-a", "'-a"), (" =1", "' =1"),
        ("-1.5", "-1.5"), ("+2", "+2"), ("-inf", "-inf"), (-1.5, -1.5), (None, None), ("a", "a"),
    ],
)  # fmt: skip
def test_no_text_in_a_table_is_a_formula(value, written):
    assert cell(value) == written


@pytest.mark.parametrize("text", ["1_0", "010", "2^1_0", "nan", "2^-2^3", "-1", "2^99999", "0^-1"])
def test_gamma_is_a_decimal_number(text):
    with pytest.raises(UserError, match="--gamma is"):
        parse_gamma(text)
    assert (parse_gamma("2^-12"), parse_gamma("0.03"), parse_gamma("2**3")) == (2**-12, 0.03, 8)
