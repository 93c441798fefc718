"""Studies become valid runs, or one line that says which setting is wrong and where it stands."""

import dataclasses
import json
import re
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyco_lab import gamma
from lyco_lab.adapters import ADAPTERS, describe
from lyco_lab.config import Data, Evaluate, Generate, Model, Run, Train, Wandb, load_study
from lyco_lab.config.compose import KEYS, SECTIONS, parse_overrides, read_yaml
from lyco_lab.config.groups import Group
from lyco_lab.config.run import LAYER_PRESETS
from lyco_lab.config.values import literal, resolve
from lyco_lab.diffusion import targets
from lyco_lab.errors import UserError
from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.record import Record

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
HEAD = "question: Does it work?\nexpectation: It does.\n"


@pytest.fixture
def study(tmp_path):
    """Write a study.yaml and load it."""

    def load(body="", overrides=(), head=HEAD):
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "study.yaml").write_text(head + textwrap.dedent(body))
        return load_study(folder, overrides)

    return load


@pytest.fixture
def refused(study):
    """The message of the error that a study ends in."""

    def load(body="set: {data: {concept: kael}}", overrides=(), **options):
        with pytest.raises(UserError) as caught:
            study(body, overrides, **options)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return load


def a_run(**changes):
    return Run(**{"name": "x", "study": "s", "data": Data(concept="kael")} | changes)


# What is read


def test_defaults_base_study_and_command_line_override_in_this_order(study, tmp_path):
    (tmp_path / "base.yaml").write_text("train: {lr: 1e-4, steps: 50, batch_size: 3}\nseed: 5\n")
    (run,) = study(
        """
        base: ../base.yaml
        set: {train: {steps: 60, batch_size: 6}, data: {concept: kael}}
        """,
        ["train.batch_size=7"],
    ).runs
    assert (run.train.lr, run.train.steps, run.train.batch_size) == (1e-4, 60, 7)
    assert (run.seed, run.train.init_scale, run.data.concept) == (5, 1.0, "kael")
    assert (run.name, run.study) == ("mine", "mine")


def test_a_grid_is_every_combination_and_names_its_runs(study):
    loaded = study(
        """
        set: {data.concept: kael}
        grid: {adapter.rank: [2, 4], model.preset: [attn-mlp, full], seed: [0]}
        """
    )
    assert [run.name for run in loaded.runs] == [
        "rank2-attn_mlp-seed0",
        "rank2-full-seed0",
        "rank4-attn_mlp-seed0",
        "rank4-full-seed0",
    ]
    assert [run.adapter["rank"] for run in loaded.runs] == [2, 2, 4, 4]
    assert loaded.run("rank4-full-seed0").model.preset == "full"


def test_groups_keep_their_settings_to_themselves(study):
    word = "train.groups=[{layers: [a], optimizer: {eps: 2}}, {layers: [b], optimizer: {%s: 3}}]"
    for other in ("weight_decay", "eps"):
        (run,) = study("set: {data.concept: kael}", [word % other]).runs
        assert [group.optimizer for group in run.train.groups] == [{"eps": 2.0}, {other: 3.0}]


VARIANTS = """
    set: {train: {steps: 40}}
    grid: {data.concept: [kael, octo]}
    runs:
      - name: lora
        set: {adapter: {kind: LoRA, rank: 2}}
      - name: plain
        set: {adapter: {kind: native}, train: {lr: 1e-4}}
      - name: alone
        grid: {}
        set: {data: {concept: arch}}
    pairs:
      - [lora-kael, lora-octo]
"""


def test_variants_combine_with_the_grid_unless_they_have_their_own(study):
    loaded = study(VARIANTS)
    names = ["lora-kael", "lora-octo", "plain-kael", "plain-octo", "alone"]
    assert [run.name for run in loaded.runs] == names
    assert loaded.runs[3].adapter == describe(ADAPTERS["native"]())
    assert loaded.runs[3].train == Train(steps=40, lr=1e-4)
    assert loaded.runs[4].data == Data(concept="arch")
    assert loaded.pairs == (("lora-kael", "lora-octo"),)
    assert (loaded.question, loaded.expectation) == ("Does it work?", "It does.")


def test_a_setting_of_the_grid_on_the_command_line_shrinks_the_grid(study):
    body = VARIANTS.split("pairs:")[0].replace("alone", "alone2").replace("arch", "falls")
    loaded = study(body, ["data.concept=dino"])
    assert [run.name for run in loaded.runs] == ["lora-dino", "plain-dino", "alone2"]
    assert {run.data.concept for run in loaded.runs} == {"dino"}


def test_an_adapter_has_the_defaults_of_its_kind_and_forgets_another_kind(study):
    (run,) = study(
        """
        set: {data.concept: kael, adapter: {kind: lora, conv_rank: 3}}
        runs: [{name: lokr, set: {adapter.kind: LoKr}}]
        """,
        ["adapter.factor=4"],
    ).runs
    assert run.adapter_value() == ADAPTERS["lokr"](factor=4)
    assert run.adapter == {"kind": "lokr"} | dataclasses.asdict(ADAPTERS["lokr"](factor=4))


def test_an_adapter_may_hold_another(study):
    dora = "{kind: dora, of: {kind: LoHa, rank: 8, alpha: 4}, axis: in, detached: true}"
    (run,) = study(f"set: {{data.concept: kael, adapter: {dora}}}", ["adapter.of.rank=2"]).runs
    of = ADAPTERS["loha"](rank=2, alpha=4.0)
    assert run.adapter_value() == ADAPTERS["dora"](of=of, axis="in", detached=True)
    assert run.adapter["of"] == {"kind": "loha"} | dataclasses.asdict(of)
    assert run.hash == a_run(adapter=run.adapter).hash
    (run,) = study(f"set: {{data.concept: kael, adapter: {dora}}}", ["adapter.of.kind=native"]).runs
    assert run.adapter_value().of == ADAPTERS["native"]()  # the rank was the other kind's
    (run,) = study("set: {data.concept: kael, adapter.kind: dora}", ["adapter.of.rank=2"]).runs
    assert run.adapter_value() == ADAPTERS["dora"](of=ADAPTERS["lora"](rank=2))


def test_an_adapter_within_another_survives_the_way_to_its_folder(tmp_path):
    run = a_run(adapter={"kind": "dora", "of": {"kind": "lokr", "factor": 4}})
    Record.open(tmp_path, run)
    assert Record.open(tmp_path, run).path.name == run.folder_name


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["adapter.of.rnak=3"], ["adapter.of.rnak", "did you mean 'adapter.of.rank'?"]),
        (["adapter.of.rank=x"], ["adapter.of.rank is 'x'", "a whole number"]),
        (["adapter.of.kind=lorra"], ["adapter.of.kind is 'lorra'", "did you mean 'lora'?"]),
        (["adapter.of.factor=4"], ["adapter.of.factor", "'lora' has no 'factor'"]),
        (["adapter.of=lora"], ["adapter.of is 'lora'", "the command line", "keys of its own"]),
        (["adapter.of.kind=dora"], ["adds to the weight"]),
        (["adapter.axis=inn"], ["did you mean 'in'?"]),
        (["adapter.detached=1"], ["adapter.detached is 1", "true or false"]),
    ],
)
def test_what_is_wrong_in_an_adapter_within_another(refused, words, parts):
    message = refused("set: {data.concept: kael, adapter.kind: dora}", words)
    for part in parts:
        assert part in message


def test_a_setting_without_a_kind_stays_when_its_kind_is_named_and_is_never_lost(study, refused):
    (run,) = study("set: {data.concept: kael, adapter.rank: 3}", ["adapter.kind=lora"]).runs
    assert run.adapter["rank"] == 3
    body = "set: {data.concept: kael, adapter.rank: 3}\ngrid: {adapter.kind: [lora, loha]}"
    assert "adapter.rank" in refused(body) and "would be lost" in refused(body)


def test_interpolation_is_resolved(study):
    (run,) = study("set: {data.concept: kael, train: {lr: 1e-3, text_encoder_lr: '${.lr}'},"
                   " model.text_encoder: true}").runs  # fmt: skip
    assert run.train.text_encoder_lr == 1e-3


PIECES = ["\\", "${a}", "${oc.env:HOME}", "${", "}", "{", "x", " ", "$", "${b", "'", '"', ":", "."]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_any_text_is_resolved_by_one_rule_and_reads_nothing_from_outside(text):
    assert resolve({"a": "V", "s": literal(text)}, "study.yaml")["s"] == text

    def naive(match):  # half of the backslashes stay; an even number of them leaves a reference
        slashes, rest = match[1], match[0][len(match[1]) :]
        return slashes[: len(slashes) // 2] + ("V" if len(slashes) % 2 == 0 else rest)

    try:
        found = resolve({"a": "V", "s": text}, "study.yaml")["s"]
    except UserError:
        return
    assert found == re.sub(r"(\\*)\$\{(?:a\})?", naive, text)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.lr=1e-3", 1e-3),
        ("train.lr= 1e-3 ", 1e-3),
        ("train.lr=010", "010"),  # no number, and so an error
        ("train.lr=1_0e-4", "1_0e-4"),
        ("train.lr=1:30", "1:30"),
        ("train.lr=0x10", "0x10"),
        ("train.lr='1'", "'1'"),
        ("train.grad_clip=null", None),
        ("data.buckets=[64, 128, 8]", [64, 128, 8]),
        ("train.groups=[{lr: 1e-1}]", [{"lr": 0.1}]),
        ("data.flip=true", True),
        ("data.prefix=a photo of ", "a photo of "),
        ("data.folder=set #2", "set #2"),
        ("data.folder=a=b", "a=b"),
        ("data.folder='no'", "'no'"),
        ("data.folder=[1]", "[1]"),
        ("data.folder=no", "no"),
        ("data.folder=010", "010"),
        ("data.folder=???", "???"),
        ("data.folder=", ""),
        ("data.folder=null", None),
        ("data.prefix=null", "null"),
        ("adapter.kind=lora ", "lora "),
        ("adapter.of.axis= in", " in"),
    ],
)
def test_text_is_taken_as_it_stands_and_numbers_are_decimal(word, value):
    key = word.partition("=")[0]
    assert parse_overrides([word]) == {key: value}


@pytest.mark.parametrize("number", ["010", "1_0", "0x10", "12:30", "0b1", "1_0e-4", "'1'", "١"])
def test_what_some_read_as_another_number_is_refused(refused, number):
    for key in ("train.steps", "train.lr", "optimizer.eps"):
        assert f"{key} is " in refused(overrides=[f"{key}={number}"])
        if number != "'1'":  # a number in quotes is one in a file
            assert f"{key} is " in refused(f"set: {{data.concept: kael, {key}: {number}}}")


def test_text_in_a_file_is_what_it_looks_like(study):
    for text in ("010", "12:30", "1_0", "2024-01-01", "0x10", "='1", "@x"):
        quoted = f"'{text}'" if text == "@x" else text
        (run,) = study(f"set: {{data: {{folder: {quoted}}}}}").runs
        assert run.data.folder == text


def test_base_yaml_spells_out_every_setting_with_its_default():
    base = read_yaml(EXPERIMENTS / "base.yaml")
    spelled = {"seed": 0} | {name: dataclasses.asdict(cls()) for name, cls in SECTIONS.items()
                             if name != "data"}  # fmt: skip
    spelled["data"] = {field.name: field.default for field in dataclasses.fields(Data)}
    spelled["train"]["warmup_steps"] = None  # which follows from the steps
    kinds = {"adapter": ADAPTERS["lora"](), "optimizer": OPTIMIZERS["adamw"]()}
    for name, default in kinds.items():
        spelled[name] = {"kind": type(default).__name__.lower()} | dataclasses.asdict(default)
    assert base == json.loads(json.dumps(spelled))


def test_the_presets_are_those_that_exist():
    assert LAYER_PRESETS == targets.PRESETS


# The studies that ship


@pytest.mark.parametrize(
    "path", sorted(EXPERIMENTS.rglob("study.yaml")), ids=lambda p: p.parent.name
)
def test_every_study_loads(path):
    loaded = load_study(path.parent)
    assert loaded.runs and loaded.name == path.parent.name


def test_the_pairs_of_the_demo_are_rewritten_as_the_theorem_says():
    demo = load_study(EXPERIMENTS / "demo")
    assert demo.pairs
    for first, second in demo.pairs:
        original, folded = demo.run(first), demo.run(second)
        rewritten = gamma.rewrite(original)
        assert dataclasses.replace(rewritten, name=second) == folded != original
        assert gamma.equivalent(original, folded).bitwise


# What names a run


def test_the_hash_ignores_what_cannot_change_the_result():
    run = a_run()
    assert run.hash == a_run(name="y", study="t", wandb=Wandb(mode="disabled")).hash
    assert run.hash == a_run(adapter={"kind": "lora", "rank": 8}).hash  # its default
    assert run.hash == a_run(adapter={"kind": "LoRA"}).hash
    assert run.folder_name == f"x-{run.hash}"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"data": Data(concept="octo")},
        {"data": Data(folder="kael")},
        {"model": Model(text_encoder=True)},
        {"adapter": {"kind": "lora", "rank": 9}},
        {"adapter": {"kind": "loha", "rank": 8}},
        {"train": Train(lr=2e-3)},
        {"generate": Generate(seed=1)},
        {"evaluate": Evaluate(trigger_in_text="keep")},
    ],
    ids=str,
)
def test_the_hash_sees_everything_else(change):
    assert a_run(**change).hash != a_run().hash


@settings(max_examples=30, deadline=None)  # each example writes to the disk
@given(
    lr=st.floats(min_value=1e-30, max_value=1e30),
    folder=st.text(
        st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60
    ),
    betas=st.tuples(*[st.floats(min_value=0, max_value=1, exclude_max=True)] * 2),
)
def test_a_run_survives_the_way_to_its_folder_and_back(tmp_path_factory, lr, folder, betas):
    root = tmp_path_factory.mktemp("runs")
    optimizer = {"kind": "adamw", "betas": betas}
    groups = (Group(factors=("b_*",), lr=lr, optimizer={"eps": 2.0}),)
    run = a_run(data=Data(folder=folder), optimizer=optimizer, train=Train(lr=lr, groups=groups))
    path = Record.open(root, run).path
    assert Record.open(root, run).path == path  # its config.yaml reads as what it was
    read = read_yaml(path / "config.yaml") if "${" not in folder else run.to_dict()
    for section in ("train", "optimizer"):
        assert read[section] == run.to_dict()[section]


@pytest.mark.parametrize(
    "text", ["no", "1e3", "12:30:45", "4:3", "null", "~", "0777", "${x}", "on"]
)
def test_words_that_yaml_would_read_as_something_else_come_back(tmp_path, text):
    run = a_run(data=Data(folder=text))
    assert Record.open(tmp_path, run) == Record.open(tmp_path, run)


# What is refused: settings


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("trian.lr=1", ["'trian.lr'", "the command line", "did you mean 'train.lr'?"]),
        ("trian.stpes=1", ["did you mean 'train.steps'?"]),
        ("lr=1", ["did you mean 'train.lr'?"]),
        ("train.stpes=1", ["did you mean 'train.steps'?"]),
        ("train.types=[train]", ["did you mean 'generate.types'?"]),
        ("rank=1", ["did you mean 'adapter.rank'?"]),
        ("adapter.factor=4", ["'lora' has no 'factor'", "it takes rank, alpha"]),
        ("adapter.rnk=4", ["did you mean 'adapter.rank'?"]),
        ("name=x", ["'name'"]),
        ("train.lr.a=1", ["'train.lr.a'"]),
        ("train=1", ["train is 1", "needs keys"]),
        ("train={}", ["train is {}", "needs keys"]),
        ("train.steps=1.5", ["train.steps is 1.5", "the command line", "a whole number"]),
        ("train.steps=many", ["train.steps is 'many'", "a whole number"]),
        ("train.steps=true", ["train.steps is True", "a whole number"]),
        ("train.steps=null", ["train.steps is None", "a whole number"]),
        ("train.lr=fast", ["train.lr is 'fast'", "a number"]),
        ("train.grad_clip=x", ["a number or null"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas is [0.9]", "a list of two numbers"]),
        ("optimizer.betas=0.9", ["a list of two numbers"]),
        ("generate.types=train", ["generate.types is 'train'", "a list of words"]),
        ("model.text_encoder=1", ["model.text_encoder is 1", "true or false"]),
        ("train.lr=${nothing}", ["nothing", "the command line"]),
        ("train.lr", ["'train.lr' is not a setting", "key=value"]),
        ("=3", ["is not a setting"]),
        ("train.lr=[", ["'train.lr=['", "the command line"]),
        ("train.weight_decay=0.1", ["did you mean 'optimizer.weight_decay'?"]),
        ("train.groups=3", ["train.groups is 3", "a list of groups"]),
        ("train.groups=[{lrr: 2}]", ["group 1 of train.groups", "'lrr'", "did you mean 'lr'?"]),
        ("train.groups=[{lr: fast}]", ["train.groups[1].lr is 'fast'", "a number"]),
        ("train.groups=[{layers: unet}]", ["train.groups[1].layers", "a list of words"]),
        ("train.groups=[{optimizer: 2}]", ["train.groups[1].optimizer", "names with numbers"]),
    ],
)
def test_unknown_keys_and_wrong_types(refused, word, parts):
    message = refused(overrides=[word])
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("model.preset=attn_mlp", "did you mean 'attn-mlp'?"),
        ("model.precision=fp16", "did you mean 'bf16'?"),
        ("model.path=", "model.path is ''"),
        ("adapter.kind=lorra", "did you mean 'lora'?"),
        ("adapter.kind=null", "adapter.kind is 'null'"),
        ("adapter.rank=0", "rank"),
        ("optimizer.kind=adamv", "did you mean 'adam"),
        ("optimizer.kind=null", "optimizer.kind is 'null'"),
        ("generate.types=[trian]", "did you mean 'train'?"),
        ("generate.types=[train, train]", "distinct"),
        ("generate.types=[]", "distinct"),
        ("evaluate.trigger_in_text=remove", "drop, keep, class"),
        ("wandb.mode=ofline", "did you mean 'offline'?"),
        ("wandb.project=", "wandb.project"),
        ("seed=-1", "seed is -1"),
        (
            "data.repeats=0",
            "data.repeats is 0, needs a number from 1 to 10,000, in the command line",
        ),
        ("data.limit=0", "data.limit is 0, needs a number from 1 to"),
        ("train.steps=0", "train.steps is 0"),
        ("train.batch_size=0", "train.batch_size is 0"),
        ("train.lr=0", "train.lr is 0"),
        ("train.lr=.nan", "train.lr is nan"),
        ("train.lr=.inf", "train.lr is inf"),
        (
            "optimizer.weight_decay=-1",
            "optimizer.weight_decay is -1, needs a number from 0 to 1e+30",
        ),
        ("optimizer.betas=[0.9, 1.0]", "adamw needs betas >= 0 and < 1, got (0.9, 1.0)"),
        ("optimizer.momentum=0.9", "'adamw' has no 'momentum'; it takes betas"),
        ("train.groups=[{lr: 0}]", "train.groups[1].lr is 0"),
        ("train.groups=[{layers: []}]", "a group needs patterns"),
        ("train.groups=[{optimizer: {momentum: 2}}]", "for 'adamw' that can be eps, weight_decay"),
        ("train.grad_clip=0", "train.grad_clip is 0"),
        ("train.ema_decay=1", "train.ema_decay is 1"),
        ("train.caption_dropout=1.5", "train.caption_dropout is 1.5"),
        ("train.caption_dropout=.nan", "train.caption_dropout is nan"),
        ("train.init_scale=0", "train.init_scale is 0"),
        ("train.checkpoint_every=0", "train.checkpoint_every is 0"),
        ("train.warmup_steps=300", "warmup_steps < steps = 300"),
        ("train.warmup_steps=-1", "train.warmup_steps is -1"),
        ("train.sample_every=301", "no sample is drawn"),
        ("train.text_encoder_lr=1e-4", "model.text_encoder is false"),
        ("embedding.token=a b", "a word of letters, digits"),
        ("embedding.token=sks", "embedding.init is None, needs words"),
        ("embedding.init=cat", "does nothing without embedding.token"),
        ("embedding.lr=1", "does nothing without embedding.token"),
        ("trainer.accelerator=tpu", "needs one of auto, cpu, gpu"),
        ("trainer.devices=0", "trainer.devices is 0"),
        ("trainer.devices=3", "train.batch_size is 4, which trainer.devices = 3 cannot share"),
        ("trainer.strategy=dpp", "did you mean 'ddp'?"),
        ("trainer.strategy=ddp", "there is nothing to average"),
        ("trainer.strategy=fsdp", "there is nothing to average or share"),
        ("trainer.strategy=deepspeed_stage_2", "'fsdp' shares"),
        ("data.folder=x", "exactly one of data.concept, data.folder and data.toml"),
        ("data.toml=x", "exactly one of data.concept, data.folder and data.toml"),
        ("data.concept=null", "exactly one of data.concept, data.folder and data.toml"),
        ("data.flip=true", "data.concept is given: flip is for pictures of your own"),
        ("generate.images_per_type=0", "generate.images_per_type is 0"),
        ("generate.guidance=0.5", "generate.guidance is 0.5"),
        ("generate.seed=-1", "generate.seed is -1"),
    ],
)
def test_values_and_combinations_that_cannot_work(refused, word, part):
    assert part in refused(overrides=[word])


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("dropout=0.1", "options.dropout is 0.1, but what Norm scales is the normalised input"),
        ("rank_dropout=0.1", "options.rank_dropout is 0.1, but the update of Norm has no rank-one"),
        ("use_scalar=true", "options.use_scalar needs an update that is a product of factors"),
    ],
)
def test_options_that_norms_cannot_take(study, refused, option, part):
    said = refused(overrides=["model.train_norm=true", f"options.{option}"])
    assert "model.train_norm is true, and " + part in said
    for fine in ("module_dropout=0.1", "max_norm=1.0"):
        body = "set: {data: {concept: kael}}"
        (run,) = study(body, ["model.train_norm=true", f"options.{fine}"]).runs
        assert run.model.train_norm


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("data.balance=class", "did you mean 'classes'?"),
        ("data.bad_files=skip", "data.bad_files is 'skip', needs one of error, drop"),
        ("data.resolution=32", "data.resolution is 32, needs a number from 64 to 16,384"),
        ("data.buckets=[320, 960]", "data.buckets is [320, 960]"),
        ("data.buckets=[320, 960, 60]", "[smallest, largest, step]"),
        ("data.buckets=[320, 950, 64]", "[smallest, largest, step]"),
        ("data.buckets=[960, 320, 64]", "[smallest, largest, step]"),
        ("data.crop=random", "needs data.latents=live"),
        ("data.masks=alhpa", "did you mean 'alpha'?"),
        ("data.caption_extension=txt", "needs a leading '.'"),
        ("data.trigger=", "data.trigger is ''"),
        ("data.trigger_rule=keep", "data.trigger is null"),
        ("data.keep_tags=1", "tags are neither shuffled nor dropped"),
        ("data.tag_separator=;", "tags are neither shuffled nor dropped"),
        ("data.tag_separator= ", "data.tag_separator is ' '"),
        ("data.tag_dropout=1.1", "data.tag_dropout is 1.1"),
        ("data.prior_share=0.5", "data.prior_share is 0.5, needs a data.prior"),
        ("data.prior_weight=2", "data.prior_weight is 2.0, needs a data.prior"),
        ("data.latents=bf16", "data.latents is 'bf16'"),
    ],
)
def test_settings_of_data_that_cannot_work(refused, word, part):
    assert part in refused("set: {data: {folder: x}}", overrides=[word])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["data.prior=p", "data.prior_share=1"], "data.prior_share is 1.0, needs between 0 and 1"),
        (["data.prior=p", "data.prior_weight=0"], "data.prior_weight is 0"),
        (["data.repeats=3", "data.balance=classes"], "data.balance is 'classes', which sets them"),
    ],
)
def test_settings_of_data_that_cannot_work_together(refused, words, part):
    assert part in refused("set: {data: {folder: x}}", overrides=words)


@pytest.mark.parametrize("word", ["data.flip=true", "data.buckets=[320, 960, 64]"])
def test_what_a_toml_file_says_is_said_there(refused, word):
    assert "is to be said in x.toml" in refused("set: {data.toml: x.toml}", overrides=[word])


@pytest.mark.parametrize("word", ["optimizer.betas=[0.8, 0.9]", "optimizer.eps=1e-6"])
def test_settings_of_another_optimizer_are_refused(refused, word):
    assert "'sgd' has no" in refused(overrides=["optimizer.kind=sgd", word])


def test_a_setting_twice_on_the_command_line(refused):
    assert "twice" in refused(overrides=["train.lr=1", "train.lr=2"])


def test_a_message_names_the_file_and_the_run_it_is_about(refused, tmp_path):
    message = refused("runs: [{name: a, set: {data.concept: kael, train.steps: x}}]")
    assert str(tmp_path / "mine" / "study.yaml") in message
    assert "run 'a'" in message


def test_a_mistake_in_the_base_names_the_base(refused, tmp_path):
    (tmp_path / "base.yaml").write_text("train: {lrr: 1}")
    message = refused("base: ../base.yaml")
    assert "base.yaml" in message and "did you mean 'train.lr'?" in message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["loss=l2"], "train.loss is 'l2', needs one of mse, huber, smooth_l1"),
        (["loss=hubr"], "did you mean 'huber'?"),
        (["huber_delta=0.1"], "does nothing without train.loss=huber or smooth_l1"),
        (["loss=huber", "huber_delta=0"], "train.huber_delta is 0"),
        (["min_snr_gamma=0"], "train.min_snr_gamma is 0"),
        (["min_snr_gamma=.inf"], "train.min_snr_gamma is inf"),
        (["min_snr_gamma=5", "debiased=true"], "both weigh the timesteps, use one of them"),
        (["timestep_sampling=logit-normal"], "did you mean 'logit_normal'?"),
        (["logit_mean=0"], "does nothing without train.timestep_sampling=logit_normal"),
        (["timestep_sampling=logit_normal", "logit_std=0"], "train.logit_std is 0"),
        (["timestep_sampling=logit_normal", "logit_mean=.nan"], "train.logit_mean is nan"),
        (["min_timestep=-1"], "train.min_timestep is -1"),
        (["min_timestep=5", "max_timestep=5"], "needs more than min_timestep = 5"),
        (["noise_offset=0"], "train.noise_offset is 0"),
        (["input_perturbation=-0.1"], "train.input_perturbation is -0.1"),
        (["multires_noise_iterations=0"], "train.multires_noise_iterations is 0"),
        (["multires_noise_discount=0.3"], "does nothing without train.multires_noise_iterations"),
        (["multires_noise_iterations=6", "multires_noise_discount=0"], "a number in (0, 1]"),
        (["multires_noise_iterations=6", "noise_offset=0.1"], "use one of them"),
        (["accumulate=0"], "train.accumulate is 0"),
        (["validate_every=10"], "give one of these two"),
        (["validate_every=10", "validation_share=0.5", "validation_folder=x"], "give one of these"),
        (["validate_every=301", "validation_share=0.5"], "else no check is made"),
        (["validate_every=10", "validation_share=1"], "train.validation_share is 1"),
        (["validation_share=0.1"], "does nothing without train.validate_every"),
        (["validation_folder=x"], "does nothing without train.validate_every"),
        (["stop_on_divergence=1"], "train.stop_on_divergence is 1"),
        (["divergence_checks=2"], "does nothing without train.stop_on_divergence"),
        (["stop_on_divergence=2", "divergence_checks=6"], "made every 50 steps: in steps = 300"),
        (["stop_on_divergence=2", "divergence_checks=0"], "train.divergence_checks is 0"),
        (["schedule=cosin"], "did you mean 'cosine'?"),
        (["schedule_end=0.1"], "does nothing without a train.schedule that falls"),
        (["schedule=linear", "schedule_end=1"], "train.schedule_end is 1.0"),
        (["schedule=linear", "schedule_restarts=2"], "without train.schedule=cosine_restarts"),
        (["schedule=cosine", "schedule_power=2"], "without train.schedule=polynomial"),
        (["schedule=cosine_restarts"], "needs train.schedule_restarts"),
        (["schedule=polynomial"], "needs train.schedule_power"),
        (["schedule=cosine_restarts", "schedule_restarts=140"], "needs 1 to 139"),
    ],
)
def test_settings_of_train_that_cannot_work(refused, words, part):
    assert part in refused(overrides=[f"train.{word}" for word in words])


def test_a_toml_file_says_nothing_of_a_validation_folder(refused):
    words = ["train.validate_every=9", "train.validation_folder=x"]
    assert "said in x.toml" in refused("set: {data.toml: x.toml}", overrides=words)


def test_an_optimizer_that_averages_needs_no_schedule(refused):
    words = ["optimizer.kind=schedulefree", "train.schedule=cosine"]
    assert "averages the factors instead of slowing down" in refused(overrides=words)


# What is refused: studies


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("grids: {seed: [0]}", "did you mean 'grid'?"),
        ("grid: {seed: 0}", "needs a list of values"),
        ("grid: {seed: []}", "needs a list of values"),
        ("grid: [seed]", "needs key: [values]"),
        ("grid: {adapter: [{kind: lora}]}", "use `runs`"),
        ("grid: {sed: [0]}\nset: {data.concept: kael}", "did you mean 'seed'?"),
        ("grid: {seed: [0, 0]}\nset: {data.concept: kael}", "two runs"),
        ("set: 3", "needs settings below it"),
        ("set: {train: }", "train is None"),
        ("set: {train.lr: 1, train: {lr: 2}}", "twice"),
        ("runs: []", "needs a list"),
        ("runs: [lora]", "needs a name"),
        ("runs: [{set: {}}]", "needs a name"),
        ("runs: [{name: a, sets: {}}]", "did you mean 'set'?"),
        ("runs: [{name: a/b, set: {data.concept: kael}}]", "as it names a folder"),
        ("runs: [{name: ä, set: {data.concept: kael}}]", "as it names a folder"),
        (
            "set: {data.concept: kael}\nruns: [{name: a}, {name: b}]",
            "'a' and 'b' of .* are the same configuration",
        ),
        (
            "grid: {seed: [1]}\nruns: [{name: a, set: {seed: 0}}]",
            "seed is set in .* and also in its grid",
        ),
        ("set: {data.concept: kael}\npairs: [[mine, mine]]", "names of two runs"),
        ("set: {data.concept: kael}\npairs: [mine]", "names of two runs"),
        ("set: {data.concept: kael}\npairs: [[mine, mien]]", "did you mean 'mine'?"),
        ("base: nowhere.yaml", "cannot read .*nowhere.yaml"),
        ("set: {a: [}", "not valid YAML"),
        ("set: {}\nset: {}", "not valid YAML"),
    ],
)
def test_studies_that_are_not_well_formed(refused, body, part):
    assert re.search(part.replace("?", r"\?").replace("[v", r"\[v"), refused(body))


@pytest.mark.parametrize("head", ["", "question: Why?\n", "question: ' '\nexpectation: It does.\n"])
def test_a_study_says_what_it_asks_and_expects(refused, head):
    assert "in a sentence" in refused("set: {data.concept: kael}", head=head)


def test_a_list_is_not_a_study(refused):
    assert "keys and values" in refused("- 1\n", head="")


def test_a_folder_that_is_not_a_study(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "study.yaml").write_text(HEAD)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"does not exist \(did you mean '.*/demo'\?\)"):
        load_study(tmp_path / "dmo")
    with pytest.raises(UserError, match=r"has no study\.yaml"):
        load_study(tmp_path / "empty")
    with pytest.raises(UserError, match="is a file, needs the folder"):
        load_study(tmp_path / "demo" / "study.yaml")


def test_pairs_keep_the_values_that_make_them_pairs(refused):
    body = """
        set: {data.concept: kael}
        runs: [{name: a, set: {train.lr: 1e-3}}, {name: b, set: {train.lr: 2e-3}}]
        pairs: [[a, b]]
    """
    assert "the pair a, b" in refused(body, ["train.lr=5e-4", "train.steps=30"])


# Every key


@pytest.mark.parametrize("key", KEYS)
def test_every_key_slightly_misspelt_leads_back_to_itself_or_its_section(refused, key):
    section, _, name = key.rpartition(".")
    if len(name) < 4:
        return
    slip = name[:1] + name[2] + name[1] + name[3:]
    if slip == name:
        slip = name + "x"
    assert "did you mean" in refused(overrides=[f"{section}.{slip}=1".lstrip(".")])
