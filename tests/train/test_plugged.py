"""Callbacks and loggers that a run names: what they see, what they may do and may not."""

import csv
from dataclasses import replace

import pytest
import torch

from lyco_lab.config.compose import Layer, build
from lyco_lab.config.training import Plugin
from lyco_lab.errors import UserError
from lyco_lab.gamma import classes, equivalent, rewrite
from lyco_lab.longer import can
from lyco_lab.record import Record
from lyco_lab.train import plugs, train
from lyco_lab.train.checkpoint import Checkpoints, read
from tests.train.plugins import Counting
from tests.train.test_stage import factors, rows

CSV = Plugin(class_path="lightning.pytorch.loggers.CSVLogger")
MONITOR = Plugin(class_path="lightning.pytorch.callbacks.LearningRateMonitor")
STOPPING = "lightning.pytorch.callbacks.EarlyStopping"


def ours(name, **arguments):
    return Plugin(class_path=f"tests.train.plugins.{name}", init_args=arguments)


@pytest.fixture(autouse=True)
def nothing_seen():
    Counting.seen.clear()


def logged(record):
    """Step -> what the CSV logger has of it; of several sittings the later."""
    found = {}
    for file in sorted((record.path / "train" / "loggers").rglob("metrics.csv")):
        with file.open(newline="") as opened:
            for row in csv.DictReader(opened):
                values = {key: float(cell) for key, cell in row.items() if cell}
                found.setdefault(int(values.pop("step")), {}).update(values)
    return found


def test_a_logger_has_what_metrics_csv_has_and_moves_no_bit(trained, results):
    settings = {"steps": 10, "warmup_steps": 4, "validate_every": 5, "validation_share": 0.3}
    _, plain = trained("plain", **settings)
    _, told = trained("told", **settings, loggers=(CSV,))
    assert told.path.name == plain.path.name and results(told) == results(plain)
    found = logged(told)
    for row in rows(told):
        step = int(row.pop("step"))
        values = {key: float(cell) for key, cell in row.items() if cell and key != "delta_norm"}
        assert {key: found[step][key] for key in values} == pytest.approx(values, rel=1e-6)
    assert sorted(found) == list(range(1, 11)) and "validation_loss" in found[10]
    assert not (plain.path / "train" / "loggers").exists()


def test_a_monitor_of_learning_rates_sees_those_of_its_step(trained):
    _, record = trained(steps=6, warmup_steps=4, loggers=(CSV,), callbacks=(MONITOR,))
    found = logged(record)
    for row in rows(record):
        (rate,) = [v for k, v in found[int(row["step"])].items() if k.startswith("lr-")]
        assert rate == pytest.approx(float(row["lr"]))


def test_a_callback_finds_the_step_s_numbers_and_is_part_of_what_the_run_is(trained):
    run, plain = trained("plain", steps=6)
    other, counted = trained("counted", steps=6, callbacks=(ours("Counting"),), accumulate=1)
    assert other.hash != run.hash
    assert rows(counted) == rows(plain)
    for name, factor in factors(plain).items():
        assert torch.equal(factor, factors(counted)[name])
    assert [(steps, total) for steps, total, _ in Counting.seen] == [(n, n) for n in range(1, 7)]
    for (_, _, metrics), row in zip(Counting.seen, rows(counted), strict=True):
        for key in ("loss", "lr", "grad_norm"):
            assert metrics[key] == pytest.approx(float(row[key]), rel=1e-6)


@pytest.mark.parametrize("plugins", [("Counting", "Moving"), ("Moving",)])
def test_a_run_with_callbacks_that_was_stopped_goes_on_bit_for_bit(
    begin, trained, interrupted, results, plugins
):
    callbacks = tuple(map(ours, plugins))
    _, straight = trained("straight", steps=8, callbacks=callbacks, loggers=(CSV,))
    expected, _ = list(Counting.seen), Counting.seen.clear()
    run, record = begin("stopped", steps=8, callbacks=callbacks, loggers=(CSV,))
    interrupted(run, record, 6)
    del Counting.seen[4:]  # steps after the checkpoint, which are done again
    train(run, record)
    assert results(record) == results(straight)
    assert Counting.seen == expected
    assert sorted(logged(record)) == list(range(1, 9))


@pytest.mark.parametrize(
    ("accumulate", "micro"), [pytest.param(1, False, marks=pytest.mark.slow), (2, False), (2, True)]
)
def test_a_callback_that_stops_a_run_leaves_it_done_with_fewer_steps(trained, accumulate, micro):
    """In the middle of a step, too: the step is finished first."""
    stopping = ours("Counting", stop_at=5, micro=micro)
    run, record = trained("a", callbacks=(stopping,), accumulate=accumulate, batch_size=2)
    _, short = trained("b", steps=5, callbacks=(stopping,), accumulate=accumulate, batch_size=2)
    assert record.facts("train")["steps"] == 5 and len(rows(record)) == 5
    for name, factor in factors(short).items():
        assert torch.equal(factor, factors(record)[name])
    state = read(Checkpoints.of(record).files()[0])
    assert (state.step, state.ended) == (5, True)
    (record.path / "done" / "train.json").unlink()  # as if killed just before
    before = (record.path / "adapter.safetensors").read_bytes()
    train(run, record)
    assert len(rows(record)) == 5 and record.facts("train")["steps"] == 5
    assert (record.path / "adapter.safetensors").read_bytes() == before


def test_early_stopping_looks_after_each_validation(trained):
    """With a rate of almost 0 nothing gets better by 1: the third look is the second too many."""
    arguments = {"monitor": "validation_loss", "patience": 2, "min_delta": 1.0}
    stopping = Plugin(class_path=STOPPING, init_args=arguments)
    settings = {"validate_every": 2, "validation_share": 0.3, "lr": 1e-9}
    _, record = trained(callbacks=(stopping,), **settings)
    assert record.facts("train")["steps"] == 6


def test_other_processes_have_callbacks_and_no_logger(begin, tmp_path):
    from lightning.pytorch.loggers.logger import DummyLogger

    from lyco_lab.train.plugged import plugged

    run, _ = begin(callbacks=(MONITOR,), loggers=(CSV,))
    first, second = (plugged(run, tmp_path, rank) for rank in (0, 1))
    assert [type(c) for c in first.callbacks] == [type(c) for c in second.callbacks]
    (logger,), (dummy,) = first.loggers, second.loggers
    assert logger.save_dir == str(tmp_path / "loggers") and isinstance(dummy, DummyLogger)


@pytest.mark.slow
def test_two_processes_stop_together(trained):
    stopping = Plugin(
        class_path=STOPPING,
        init_args={"monitor": "validation_loss", "patience": 1, "min_delta": 1.0},
    )
    settings = {"validate_every": 2, "validation_share": 0.3, "lr": 1e-9, "batch_size": 4}
    callbacks = (stopping, MONITOR, ours("Counting"))
    _, record = trained(devices=2, callbacks=callbacks, loggers=(CSV,), **settings)
    assert record.facts("train")["steps"] == 4 and len(logged(record)) == 4


WRONG = {
    "mine_that_is_not.Watch": "there is no module 'mine_that_is_not'",
    "lightning.pytorch.calbacks.Timer": r"no module 'lightning.pytorch.calbacks' \(did you mean "
    r"'callbacks'\?\)",
    "lightning.pytorch.callbacks.Timr": r"has no Timr \(did you mean 'Timer'\?\)",
    "tests.train.plugins.NoCallback": "which is no lightning.pytorch Callback",
    "lightning.pytorch.loggers.CSVLogger": "which is no lightning.pytorch Callback",
    "lightning.pytorch.callbacks.ModelCheckpoint": r"\(a Checkpoint\), but runs save themselves: "
    "train.checkpoint_every",
    "tests.train.plugins.Averaging": r"\(a WeightAveraging\), but it exchanges the weights",
    STOPPING: "needs train.validate_every",
}


@pytest.mark.parametrize("path", WRONG)
def test_what_cannot_be_plugged_in_is_refused_before_anything_is_made(begin, path):
    run, record = begin(callbacks=(Plugin(class_path=path),))
    for refuse in (plugs, lambda run: train(run, record)):
        with pytest.raises(UserError, match=f"entry 1 of trainer.callbacks is .*{WRONG[path]}"):
            refuse(run)
    assert not (record.path / "train").exists()


def of_lightning():
    """Every kind of callback that Lightning has."""
    import lightning.pytorch.callbacks as module

    return sorted(name for name in module.__all__ if name != "Callback")


ARGUMENTS = {"EarlyStopping": {"monitor": "validation_loss"}}


@pytest.mark.slow
def test_each_callback_of_lightning_is_refused_at_once_or_leaves_the_adapter_alone(
    begin, trained, results
):
    """A version of Lightning with another kind has to be looked at: it is in neither list."""
    settings = {"steps": 2, "warmup_steps": 0, "validate_every": 2, "validation_share": 0.3}
    run, plain = trained("plain", **settings)
    refused, harmless = set(), []
    for name in of_lightning():
        path = f"lightning.pytorch.callbacks.{name}"
        plugin = Plugin(class_path=path, init_args=ARGUMENTS.get(name, {}))
        try:
            plugs(replace(run, trainer=replace(run.trainer, callbacks=(plugin,))))
            harmless.append(plugin)
        except UserError as error:
            assert path in str(error)
            refused.add(name)
    _, record = trained("harmless", callbacks=tuple(harmless), loggers=(CSV,), **settings)
    assert results(record)[1] == results(plain)[1]
    for key, factor in factors(plain).items():
        assert torch.equal(factor, factors(record)[key])
    harmless = {plugin.class_path.rpartition(".")[2] for plugin in harmless}
    assert harmless == {
        "DeviceStatsMonitor", "EarlyStopping", "LambdaCallback", "LearningRateMonitor",
        "ModelSummary", "RichModelSummary", "Timer",
    }  # fmt: skip
    assert refused == set(of_lightning()) - harmless


MEDDLING = {
    "swap": "the factors are not those that step 5 left: a callback .*plugins.Meddling",
    "replace": "are no longer the parameters that were trained: a callback .*plugins.Meddling",
    "freeze": "are no longer the parameters that were trained",
    "swap_average": "the factors are not those that step 5 left",
    "swap_state": "the factors are not those that step 5 left",
}


@pytest.mark.parametrize("how", MEDDLING)
def test_factors_that_a_callback_exchanges_after_the_last_step_are_not_exported(begin, how):
    settings = {"swap_average": {"ema_decay": 0.5}, "swap_state": {}}.get(how, {})
    optimizer = {"kind": "schedulefree"} if how == "swap_state" else None
    meddling = ours("Meddling", how=how)
    run, record = begin(callbacks=(meddling,), steps=5, optimizer=optimizer, **settings)
    with pytest.raises(UserError, match=MEDDLING[how]):
        train(run, record)
    assert not (record.path / "adapter.safetensors").exists() and not record.done("train")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("accumulate", "accumulate_grad_batches to 2: use train.accumulate, which is 1"),
        ("leave", r"the training ended after step \d though nothing asked it to"),
        ("replace", "are no longer the parameters that were trained"),
    ],
)
def test_a_callback_that_changes_what_a_step_is_is_found_out(begin, how, said):
    meddling = ours("Meddling", how=how, when="on_train_batch_start")
    run, record = begin(callbacks=(meddling,), steps=5)
    with pytest.raises(UserError, match=said):
        train(run, record)
    assert not (record.path / "adapter.safetensors").exists() and not record.done("train")


@pytest.mark.parametrize("settings", [{"ema_decay": 0.5}, {"optimizer": {"kind": "schedulefree"}}])
def test_an_average_that_is_exported_is_what_was_trained(trained, settings):
    run, record = trained(steps=5, **settings)
    assert record.done("train")


def test_a_file_that_holds_something_else_is_no_result(begin, monkeypatch):
    """Read back, as from a disk that has damaged it."""
    from lyco_lab.formats import kohya

    in_order = kohya._in_order
    monkeypatch.setattr(kohya, "_in_order", lambda data: in_order(data)[:-1] + b"?")
    run, record = begin(steps=2, warmup_steps=0)
    with pytest.raises(UserError, match="read back, does not hold the factors"):
        train(run, record)
    assert not record.done("train")


def test_a_last_step_that_leaves_no_number_is_no_result(begin, monkeypatch):
    """Its loss and gradients were finite, so no other check sees it."""
    step = torch.optim.SGD.step

    @torch.no_grad()
    def overflow(self, closure=None):
        loss = step(self, closure)
        self.param_groups[0]["params"][0].fill_(float("inf"))
        return loss

    monkeypatch.setattr(torch.optim.SGD, "step", overflow)
    run, record = begin(steps=1, warmup_steps=0, optimizer={"kind": "sgd"}, grad_clip=None)
    with pytest.raises(UserError, match="is not finite after step 1, the last.*smaller train.lr"):
        train(run, record)
    assert not record.done("train")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"stop_att": 3}, r"init_args.stop_att, and it takes stop_at, micro \(did you mean"),
        ({"stop_at": 3, "self": 1}, "init_args.self"),
    ],
)
def test_arguments_that_a_class_does_not_take_are_named(begin, arguments, said):
    run, _ = begin(callbacks=(ours("Counting", **arguments),))
    with pytest.raises(UserError, match=said):
        plugs(run)


def test_arguments_that_a_class_needs_are_asked_for(begin):
    run, _ = begin(callbacks=(Plugin(class_path=STOPPING),), validate_every=2, validation_share=0.3)
    with pytest.raises(UserError, match="missing a required argument: 'monitor'"):
        plugs(run)


def test_what_fails_later_is_said_in_one_line(begin):
    for plugin, said in (
        (ours("Broken"), "Broken cannot be made of {}: no screen"),
        (ours("Odd"), "the state of the callback tests.train.plugins.Odd cannot be kept"),
        (MONITOR, "LearningRateMonitor. callback with .Trainer. that has no logger"),
        (ours("Counting", stop_at=0), ""),
    ):
        run, record = begin(f"a-{plugin.class_path}", steps=4, callbacks=(plugin,))
        if said:
            with pytest.raises(UserError, match=said):
                train(run, record)
        else:
            train(run, record)
            assert record.facts("train")["steps"] == 4


def test_a_callback_of_the_folder_the_command_is_run_in_is_found(begin, tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_this_folder.py").write_text(
        "from lightning.pytorch import Callback\nclass Mine(Callback):\n    pass\n"
    )
    plugs(begin(callbacks=(Plugin(class_path="of_this_folder.Mine"),))[0])
    (tmp_path / "broken_here.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="importing broken_here fails: division by zero"):
        plugs(begin(callbacks=(Plugin(class_path="broken_here.Mine"),))[0])
    (tmp_path / "needs.py").write_text("import what_is_not_here\n")
    with pytest.raises(UserError, match="which needs what_is_not_here"):
        plugs(begin(callbacks=(Plugin(class_path="needs.Mine"),))[0])


def of_yaml(**trainer):
    layer = Layer("study.yaml", {"data": {"concept": "kael"}, "trainer": {"devices": 1} | trainer})
    return build("a", "tests", [layer])


def test_a_study_writes_them_as_lightning_s_command_line_does():
    given = {"class_path": "mine.Watch", "init_args": {"every": 5, "where": [1, {"a": None}]}}
    run = of_yaml(callbacks=[given], loggers=[{"class_path": "mine.Log"}])
    assert run.trainer.callbacks == (Plugin(**given),)
    assert run.to_dict()["trainer"]["callbacks"] == [given]
    assert run.trainer.loggers == (Plugin(class_path="mine.Log"),)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"class_pth": "mine.Watch"}, r"entry 1 of trainer.callbacks .* has no 'class_pth'.*mean"),
        ({"class_path": "Watch"}, "class_path of a callback or logger is 'Watch'"),
        ({"class_path": "mine.2"}, "needs package.module.Class"),
        ({}, "needs package.module.Class"),
        ({"class_path": "mine.Watch", "init_args": 3}, "needs names with values"),
        ("mine.Watch", "needs a list of entries, each with keys"),
    ],
)
def test_entries_that_are_none(entry, said):
    with pytest.raises(UserError, match=said):
        of_yaml(callbacks=[entry])


def test_callbacks_are_part_of_a_run_and_loggers_are_not():
    plain, again = of_yaml(), of_yaml(loggers=[{"class_path": "mine.Log"}], accelerator="cpu")
    assert plain.hash == again.hash
    one = of_yaml(callbacks=[{"class_path": "mine.Watch"}])
    other = of_yaml(callbacks=[{"class_path": "mine.Watch", "init_args": {"every": 2}}])
    assert len({plain.hash, one.hash, other.hash}) == 3


def test_a_folder_of_other_callbacks_is_refused(begin, tmp_path):
    run, record = begin(callbacks=(ours("Counting"),))
    other, _ = begin("other")
    other.__dict__["hash"] = run.hash  # two that share eight digits
    with pytest.raises(UserError, match="trainer.callbacks is"):
        Record.open(record.path.parent, other)


def test_nothing_is_said_of_runs_with_callbacks(tmp_path):
    """Not even of two that are equal: what a callback does may depend on anything."""
    given = [{"class_path": "mine.Watch"}]
    plain, one, same = of_yaml(), of_yaml(callbacks=given), of_yaml(callbacks=given)
    for a, b in ((one, same), (plain, one), (one, plain)):
        verdict = equivalent(a, b)
        assert not verdict and "trainer.callbacks" in verdict.reason
    assert equivalent(plain, of_yaml(loggers=given))
    assert len(classes([one, same, plain])) == 3
    with pytest.raises(UserError, match="cannot be moved: what its trainer.callbacks do"):
        rewrite(one)
    assert can(plain) and not can(one)
