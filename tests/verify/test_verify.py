"""Both runs train: equal where the theorem says so, different where a setting is not moved."""

import csv
import json

import pytest

from lyco_lab.adapters.lora import LoRA
from lyco_lab.errors import Interrupted
from lyco_lab.optimizers.adamw import AdamW
from lyco_lab.optimizers.sgd import SGD
from lyco_lab.verify import show, work
from lyco_lab.verify.table import Row
from lyco_lab.verify.verdict import DIFFERENT, EQUAL, ROUNDED

PAIRS = [
    [("lora", "adamw"), ("dora", "radam")],  # a factor that is not scaled, two phases
    [
        ("lokr-factored", "adamw"),
        ("loha", "sgd"),
        ("ia3", "lion"),
        ("glora", "adafactor"),
        ("lora", "schedulefree"),  # what is exported is an average
    ],
]


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_powers_of_two_are_equal_in_every_bit(cases, rows, quick):
    asked = [case for pair in PAIRS[0 if quick else 1] for case in cases(*pair)]
    norms = ["model.train_norm=true", "model.preset=attn-mlp"]
    if quick:
        asked += cases("lora", "adamw", dtype="bf16") + cases("lora", "sgd", carry="zero")
    else:
        asked += cases("lora,native", "adamw", settings=norms)
        asked += cases("lokr", "sgd", carry="zero", settings=norms)
    found = rows(asked)
    assert [row.verdict for row in found] == [EQUAL] * len(asked), [row.line for row in found]
    for row in found:
        assert row.holds and (row.delta_error, row.loss_error) == (0, 0)
        assert row.steps == 6 and row.layers > 0 and row.first_step is None
        assert "EQUAL (bitwise, 6 steps" in row.line


def test_other_numbers_are_equal_to_rounding(cases, rows):
    asked = cases("lora,loha", "adamw", 0.03)
    for case, row in zip(asked, rows(asked), strict=True):
        assert case.claim.equal and not case.claim.bitwise
        assert row.verdict == ROUNDED and row.holds
        assert 0 < row.delta_error < 1e-4 and row.rounding > 0
        assert f"EQUAL to {row.delta_error:.1g}" in row.line


@pytest.mark.parametrize(
    ("optimizer", "settings", "gamma"),
    [
        ("adamw", ("lr", "init_scale", "grad_clip", "eps", "weight_decay"), 2.0**-12),
        ("adamw", ("lr", "init_scale", "grad_clip", "eps", "weight_decay"), 0.01),
        ("radam", ("unrectified_lr",), 2.0**-12),
    ],
)
def test_a_setting_that_is_kept_makes_a_difference(cases, rows, optimizer, settings, gamma):
    asked = [case for name in settings for case in cases("lora", optimizer, gamma, keep=name)]
    for name, row in zip(settings, rows(asked), strict=True):
        assert (row.claim, row.verdict, row.keep) == (DIFFERENT, DIFFERENT, name), row.line
        assert row.holds  # it was not claimed
        assert "DIFFERENT as predicted from step" in row.line and row.first_place in row.line
        assert f"{name} is as in R, so " in row.line


def test_a_setting_is_kept_also_where_groups_move_it(cases, rows):
    (case,) = cases("dora", "adamw", keep="eps")
    assert case.other.train.groups
    assert case.other.optimizer["eps"] == case.base.optimizer["eps"]
    assert not any("eps" in group.optimizer for group in case.other.train.groups)
    assert rows([case])[0].verdict == DIFFERENT


def test_what_starts_at_zero_has_no_start_to_keep(cases, rows):
    (case,) = cases("native", "adamw", keep="init_scale")
    assert case.claim.equal and rows([case])[0].verdict == EQUAL


@pytest.mark.parametrize(
    ("rule", "setting", "claimed", "right"),
    [(SGD, "weight_decay", -1, -2), (AdamW, "eps", 0, -1), (SGD, "lr", 1, 2)],
)
def test_a_wrong_power_is_found_and_named(verify, monkeypatch, rule, setting, claimed, right):
    monkeypatch.setattr(rule, "powers", {**rule.powers, setting: claimed})
    done = verify("--optimizer", rule.__name__.lower())
    assert done.exit_code == 1
    assert "DIFFERENT from step 1" in done.stdout
    assert f"equal if {setting} moved by s**{right}, where " in done.stdout
    assert f"claims s**{claimed}" in done.stdout


def test_a_wrong_transform_is_found(verify, monkeypatch):
    right = LoRA.transform
    monkeypatch.setattr(LoRA, "kernel", lambda self, shape: None)
    monkeypatch.setattr(LoRA, "change", lambda self, layer, x, factors: layer.formed(
        x, lambda given: self.delta(layer.weight(), given), factors))  # fmt: skip
    monkeypatch.setattr(
        LoRA, "transform", lambda self, f, shape: right(self, f, shape) + f["a_RQ"].sum()
    )
    done = verify()
    assert done.exit_code == 1 and "DIFFERENT from step 1, first in the loss" in done.stdout
    assert "the losses differ before any step is made" in done.stdout


def test_what_the_theorem_leaves_out_is_tried_and_not_judged(verify):
    done = verify("--adapter", "oft")
    assert done.exit_code == 0
    assert "no claim: the update of OFT is not homogeneous" in done.stdout
    assert "trained all the same: DIFFERENT" in done.stdout


def test_a_run_that_diverges_is_a_mistake_and_the_others_are_done(verify, tmp_path):
    done = verify("--optimizer", "sgd", "--gamma", "2^-12,2^-6", "train.lr=1e30")
    assert done.exit_code == 2
    assert "2 of 2 cases could not be run" in done.stderr and done.stderr.count("\n") == 1
    assert "try a smaller train.lr than 1e+30" in done.stderr


def test_json_is_a_line_for_each_case(verify):
    done = verify("--json", "--gamma", "2^-12,0.03", "--keep", "lr")
    assert done.exit_code == 0
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["gamma"] for row in found] == [2**-12, 0.03]
    assert all(row["verdict"] == DIFFERENT and row["keep"] == "lr" for row in found)
    assert all(set(row) == set(Row.__dataclass_fields__) for row in found)


def test_a_table_and_a_csv_and_nothing_else(verify, tmp_path):
    done = verify("--adapter", "lora,ia3", "--optimizer", "sgd,lion", "--out", "new/table.csv")
    assert done.exit_code == 0
    assert "4 of 4 claimed equalities hold, 4 of them in every bit" in done.stdout
    with (tmp_path / "new" / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["case"] for row in table] == [
        f"{a} {o} fp32 gamma=2^-12" for a in ("lora", "ia3") for o in ("sgd", "lion")
    ]
    assert {row["verdict"] for row in table} == {"EQUAL"}
    assert [row["s"] for row in table] == ["2^6", "2^6", "2^12", "2^12"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "table.csv"]


def test_an_interruption_leaves_nothing(verify, monkeypatch, empty):
    def stop(job, bench):
        raise Interrupted("nothing of a verification is kept")

    monkeypatch.setattr(work, "work", stop)
    done = verify("--out", "table.csv")
    assert done.exit_code == 130 and empty()
    assert "To begin again: lyco-lab verify --out table.csv" in done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--adapter", "lorra"], "--adapter is 'lorra', needs one of boft, dora"),
        (["--adapter", "lorra"], "(did you mean 'lora'?)"),
        (["--adapter", "lokr-factord"], "(did you mean 'lokr-factored'?)"),
        (["--optimizer", "adamv"], "(did you mean 'adam"),
        (["--gamma", "0"], "--gamma is '0', needs a finite number > 0"),
        (["--gamma", "2^x"], "--gamma is '2^x'"),
        (["--gamma", ""], "nothing to verify"),
        (["--dtype", "fp16"], "--dtype is 'fp16', needs one of fp32, bf16 (did you mean"),
        (["--carry", "al"], "--carry is 'al', needs one of all, zero (did you mean 'all'?)"),
        (["--keep", "ep"], "for 'adamw' that can be lr, init_scale, grad_clip, eps, weight_decay"),
        (["--keep", "eps", "--optimizer", "sgd"], "--keep is 'eps', which does not move"),
        (["--keep", "lr", "--adapter", "oft"], "no setting moves: the update of OFT"),
        (["--keep", "lr", "train.groups=[{lr: 2}]"], "needs a run without train.groups"),
        (["--steps", "9"], "train.steps is given twice"),
        (["adapter.kind=loha"], "adapter.kind is what --adapter says"),
        (["adapter.alpha=2"], "adapter.alpha is what --gamma says"),
        (["adapter.rnk=2"], "(did you mean 'adapter.rank'?)"),
        (["train.lr=-1"], "train.lr is -1,"),
        (["--out", "."], "which is a folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(verify, monkeypatch, empty, words, part):
    monkeypatch.setattr(show, "verify", lambda cases, workers: pytest.fail("it began to work"))
    done = verify(*words)
    assert done.exit_code == 2 and empty()
    assert part in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_on_the_miniature_by_two_processes(verify, place, tmp_path):
    place.clear()
    done = verify("--adapter", "lora,tucker,dora", "--optimizer", "adamw,sgd", "--steps", 20,
                  "--gamma", "2^-12,0.03", "--workers", 2, "--out", "table.csv")  # fmt: skip
    assert done.exit_code == 0, done.stdout
    assert "12 of 12 claimed equalities hold, 6 of them in every bit" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
