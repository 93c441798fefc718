"""Checkpoints: small, plain, atomic, and passed over when damaged."""

from dataclasses import replace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lyco_lab.train.checkpoint import Checkpoints, State, read

ROWS = [f"digest of {step} rows" for step in range(21)]


def state(step, value=1.0):
    return State(
        rows=ROWS[step],
        step=step,
        factors={"unet": {"layer.a_RQ": torch.full((2, 3), value)}},
        average=None,
        optimizer={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
        seconds=1.5,
        threads=1,
    )


def same(a, b):
    return a.step == b.step and torch.equal(
        a.factors["unet"]["layer.a_RQ"], b.factors["unet"]["layer.a_RQ"]
    )


def test_what_is_saved_is_read_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(7))
    found = checkpoints.latest(ROWS[:8])
    assert same(found, state(7))
    assert found.optimizer["param_groups"] == [{"lr": 0.1}]
    assert (found.seconds, found.threads, found.average) == (1.5, 1, None)


def test_nothing_saved_is_no_state(tmp_path):
    assert Checkpoints(tmp_path / "none").latest(ROWS[:1]) is None


def test_the_last_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10, 15, 20):
        checkpoints.save(state(step))
    assert [f.name for f in checkpoints.files()] == ["step00000020.ckpt", "step00000015.ckpt"]
    assert len(list(tmp_path.iterdir())) == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_damage_anywhere_is_noticed_or_harmless(tmp_path, data):
    """A flipped bit or a lost end: either the file is refused, or what it says is unchanged."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(5))
    checkpoints.save(state(10, value=2.0))
    newest = checkpoints.files()[0]
    content = bytearray(newest.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        newest.write_bytes(content[:place])
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        newest.write_bytes(content)
    said = []
    found = checkpoints.latest(ROWS, say=said.append)
    assert same(found, state(10, value=2.0)) or (same(found, state(5)) and said)


def test_a_damaged_one_is_passed_over_with_a_message(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(5))
    checkpoints.save(state(10))
    checkpoints.files()[0].write_bytes(checkpoints.files()[0].read_bytes()[:-100])
    said = []
    assert checkpoints.latest(ROWS, say=said.append).step == 5
    assert said == ["the checkpoint step00000010.ckpt is damaged: going on from the one before it"]
    assert [f.name for f in checkpoints.files()] == ["step00000005.ckpt"]


def test_one_whose_rows_are_lost_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(5))
    checkpoints.save(state(10))
    said = []
    assert checkpoints.latest(ROWS[:8], say=said.append).step == 5
    assert "step00000010.ckpt lacks its rows in metrics.csv (7)" in said[0]


def test_one_whose_rows_were_others_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(7))
    checkpoints.save(state(10))
    said = []
    assert checkpoints.latest([*ROWS[:8], *"xyz"], say=said.append).step == 7
    assert "step00000010.ckpt was saved beside other rows than metrics.csv has now" in said[0]
    checkpoints.save(replace(state(10), rows=""))  # as they were written before
    assert checkpoints.latest([*ROWS[:8], *"xyz"]).step == 10


def test_a_file_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "hacked"), "w"))

    torch.save({"step": Evil()}, tmp_path / "step00000001.ckpt")
    assert read(tmp_path / "step00000001.ckpt") is None
    assert not (tmp_path / "hacked").exists()


def test_a_run_s_checkpoint_holds_factors_and_optimizer_only(trained):
    run, record = trained(ema_decay=0.9)
    newest = Checkpoints(record.path / "train" / "checkpoints").files()[0]
    plain = torch.load(newest, weights_only=True)
    assert plain["step"] == run.train.steps
    trainable = record.facts("train")["trainable_params"]
    tensors = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            tensors.append(value.numel())
        elif isinstance(value, dict):
            list(map(walk, value.values()))
        elif isinstance(value, list | tuple):
            list(map(walk, value))
        else:
            assert value is None or isinstance(value, int | float | str | bool)

    walk(plain)
    steps = len(plain["optimizer"]["state"])  # Adam counts its steps for each factor
    assert sum(tensors) == 4 * trainable + steps  # factors, average, two moments
