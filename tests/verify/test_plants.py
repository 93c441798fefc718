"""Wrong claims and wrong rewritings, planted one at a time: the command has to fail at each.

What is planted is as near to the right thing as it gets: a power off by one, a setting that is not
moved, a number off by 2^-20. A case may fail because training differs, because the two halves of
gamma.py (what makes A, and what compares A with R) disagree, or because it could not have told;
what it may not do is exit with 0.
"""

from dataclasses import replace

import pytest

from lyco_lab import gamma
from lyco_lab.adapters.ia3 import IA3
from lyco_lab.adapters.lora import LoRA
from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.verify.verdict import DIFFERENT, EQUAL, UNTOLD

OFF = 1 + 2.0**-20


def power(optimizer, setting, wrong):
    """The optimizer claims another power of a setting; None: it forgets the setting."""

    def plant(monkeypatch):
        rule = OPTIMIZERS[optimizer]
        powers = {**rule.powers, setting: wrong}
        kept = {key: value for key, value in powers.items() if value is not None}
        monkeypatch.setattr(rule, "powers", kept)

    return plant


def rewritten(change):
    """What `rewrite` makes is changed afterwards, and what compares is not."""

    def plant(monkeypatch):
        right = gamma._expressed

        def wrong(run, *others):
            return change(run, right(run, *others))

        monkeypatch.setattr(gamma, "_expressed", wrong)

    return plant


def of_train(**change):
    """train.X of A as `change` makes it of R's and the right one."""

    def wrong(run, moved):
        new = {
            key: make(getattr(run.train, key), getattr(moved.train, key))
            for key, make in change.items()
        }
        return replace(moved, train=replace(moved.train, **new))

    return rewritten(wrong)


def of_rule(**change):
    def wrong(run, moved):
        new = {key: make(moved.optimizer[key]) for key, make in change.items()}
        return replace(moved, optimizer={**moved.optimizer, **new})

    return rewritten(wrong)


def clip_of_groups(monkeypatch):
    right = gamma._groups
    monkeypatch.setattr(
        gamma, "_groups", lambda *given: tuple(replace(g, clip=1.0) for g in right(*given))
    )


def gamma_of_the_adapter(monkeypatch):
    right = LoRA.with_gamma
    monkeypatch.setattr(LoRA, "with_gamma", lambda self, number: right(self, OFF * number))


def degree(monkeypatch):
    """The only factor of (IA)^3 counts twice."""
    right = IA3.terms
    twice = lambda self, shape: tuple(2 * term for term in right(self, shape))  # noqa: E731
    monkeypatch.setattr(IA3, "terms", twice)
    monkeypatch.setattr(gamma, "_layers", gamma._layers.__wrapped__)  # what is cached is right


# What is planted -> the command's words, and where the fault is put.
PLANTS = {
    "lion: weight_decay by s^-2": ("lora lion", power("lion", "weight_decay", -2)),
    "lion: weight_decay forgotten": ("lora lion", power("lion", "weight_decay", None)),
    "adamw: eps by s^0": ("lora adamw", power("adamw", "eps", 0)),
    "adamw: lr by s^2": ("lora adamw", power("adamw", "lr", 2)),
    "sgd: lr by s^1": ("lora sgd", power("sgd", "lr", 1)),
    "sgd: weight_decay by s^-1": ("loha sgd", power("sgd", "weight_decay", -1)),
    "radam: unrectified_lr forgotten": ("dora radam", power("radam", "unrectified_lr", None)),
    "adafactor: eps2 by s^2": ("glora adafactor", power("adafactor", "eps2", 2)),
    "adagrad: weight_decay by s^-1": ("lora adagrad", power("adagrad", "weight_decay", -1)),
    "prodigy: d0 forgotten": ("lora prodigy", power("prodigy", "d0", None)),
    "the clip threshold is not moved": (
        "lora adamw", of_train(grad_clip=lambda ours, right: ours),
    ),
    "the start is not moved": ("lora lion", of_train(init_scale=lambda ours, right: ours)),
    "lr is off by 2^-20": ("lora sgd", of_train(lr=lambda ours, right: OFF * right)),
    "lr is off by 2^-20, gamma is no power of two": (
        "lora adamw 0.03", of_train(lr=lambda ours, right: OFF * right),
    ),
    "lr is off by 2^-20, in bfloat16": (
        "lora adamw 0.03 bf16", of_train(lr=lambda ours, right: OFF * right),
    ),
    "weight_decay is off by 2^-20": ("ia3 lion", of_rule(weight_decay=lambda right: OFF * right)),
    "eps is off by 2^-20": ("lora adamw", of_rule(eps=lambda right: OFF * right)),
    "groups are clipped as before": ("dora adamw", clip_of_groups),
    "gamma of the adapter is off by 2^-20": ("lora sgd", gamma_of_the_adapter),
    "a factor of T is counted twice": ("ia3 sgd", degree),
}  # fmt: skip
FAST = ("lion: weight_decay by s^-2", "the clip threshold is not moved",
        "lr is off by 2^-20, gamma is no power of two")  # fmt: skip


def call(verify, words):
    adapter, optimizer, *others = words.split()
    number, dtype = (*others, "2^-12", "fp32")[0], "bf16" if "bf16" in others else "fp32"
    return verify("--adapter", adapter, "--optimizer", optimizer, "--gamma", number,
                  "--dtype", dtype)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in PLANTS],
)
def test_a_planted_fault_does_not_exit_with_0(verify, monkeypatch, name):
    words, plant = PLANTS[name]
    plant(monkeypatch)
    done = call(verify, words)
    assert done.exit_code == 1, done.output
    assert "as predicted" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("words", sorted({words for words, _ in PLANTS.values()}))
def test_without_a_fault_each_of_them_exits_with_0_or_says_that_it_could_not_tell(verify, words):
    done = call(verify, words)
    told = "NO POWER TO TELL" not in done.stdout
    assert done.exit_code == (0 if told else 1) and (told or "bf16" in words), done.output


def test_a_setting_that_is_lost_in_rounding_is_said_to_be(cases, rows):
    """A decay of 1e-12 may be moved by any power; a larger one, as the message says, may not."""
    (tiny,) = cases("lora", "lion", settings=["optimizer.weight_decay=1e-12"])
    (row,) = rows([tiny])
    assert (row.claim, row.verdict, row.holds) == (EQUAL, UNTOLD, False), row.line
    assert "with weight_decay moved by s**-2 in the place of s**-1" in row.line
    assert "or a larger optimizer.weight_decay" in row.line
    (row,) = rows(cases("lora", "lion", settings=["optimizer.weight_decay=0.1"]))
    assert (row.verdict, row.holds) == (EQUAL, True), row.line


def test_a_predicted_difference_that_is_not_seen_is_no_success(cases, rows):
    (tiny,) = cases("lora", "lion", keep="weight_decay", settings=["optimizer.weight_decay=1e-14"])
    (row,) = rows([tiny])
    assert (row.claim, row.verdict, row.holds) == (DIFFERENT, UNTOLD, False), row.line
    assert "a difference is predicted" in row.line


@pytest.mark.parametrize(
    ("gamma", "carry", "inside"),
    [(2.0**-48, "all", True), (2.0**-24, "zero", True), (2.0**24, "zero", True),
     (2.0**-100, "all", False), (2.0**-70, "zero", False)],
)  # fmt: skip
def test_the_range_of_float32_bounds_what_is_claimed(cases, rows, gamma, carry, inside):
    """Inside bits are equal; far outside they are not, and nothing was claimed."""
    (case,) = cases("lora", "adamw", gamma, carry=carry)
    (row,) = rows([case])
    assert row.holds and bool(row.claim) is inside
    assert row.verdict == (EQUAL if inside else DIFFERENT), row.line
    if not inside:
        assert "no claim: " in row.line and "range of float32" in row.line
