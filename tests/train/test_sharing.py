"""Two processes with half of the frozen weights each train as two that have them all."""

import gc
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from lyco_lab.adapters.options import Options
from lyco_lab.config import Embedding, Model, Trainer
from lyco_lab.data.stage import prepare
from lyco_lab.errors import Interrupted, UserError
from lyco_lab.record import Record
from lyco_lab.train import train
from lyco_lab.train.callbacks import Rows
from lyco_lab.train.module import Training
from lyco_lab.train.sharing import blocks
from tests.conftest import TRIGGER, tiny_tokenizer
from tests.diffusion import tiny
from tests.train.stepping import at_step
from tests.train.test_processes import OTHERS, SETTINGS, stop_at
from tests.train.test_stage import factors, rows

WHOLE, SHARED = (Trainer(accelerator="cpu", devices=2, strategy=s) for s in ("auto", "fsdp"))
ALONE = Trainer(accelerator="cpu")
WORD = Embedding(token=TRIGGER, init="c", lr=1e-2)
CASES = {
    "plain": ({}, {}),
    "with-all": (
        OTHERS | {"validate_every": 4, "validation_share": 0.3}, {"embedding": WORD},
    ),
    # Its norms, and what limits them, are of the frozen weight.
    "dora": ({"adapter": {"kind": "dora"}}, {}),
    "oft": ({"adapter": {"kind": "oft", "block_size": 4}}, {"options": Options(max_norm=0.3)}),
}  # fmt: skip


@pytest.fixture
def opened(begin, tmp_path):
    """A run with these processes, and its folder."""

    def opened(where, trainer, parts=None, **settings):
        run, _ = begin(where, devices=trainer.devices, **SETTINGS | settings)
        run = replace(run, trainer=trainer, **(parts or {}))
        record = Record.open(tmp_path / where, run)
        prepare(run, record)
        return run, record

    return opened


def same_training(found, expected):
    """Up to sums in another order: as one process and two are the same training."""
    for key in ("loss", "grad_norm", "delta_norm", "validation_loss"):
        ours, theirs = (
            [float(r[key]) for r in rows(record) if r[key]] for record in (found, expected)
        )
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_shared_weights_train_what_whole_ones_do(opened, capfd, case):
    """The first loss has the same bits: weights are gathered as they were."""
    settings, parts = CASES[case]
    found, expected = (
        opened(where, trainer, parts, **settings)
        for where, trainer in (("shared", SHARED), ("whole", WHOLE))
    )
    for run, record in (found, expected):
        train(run, record)
    said = "".join(capfd.readouterr())
    assert "Error" not in said and "arning" not in said and "distributed" not in said
    assert said.count("are held out") == 2 * ("validation_share" in settings)
    assert found[1].path.name == expected[1].path.name
    assert not multiprocessing.active_children() and not torch.distributed.is_initialized()
    ours, theirs = rows(found[1]), rows(expected[1])
    assert ours[0]["loss"] == theirs[0]["loss"]
    same_training(found[1], expected[1])
    ours, theirs = factors(found[1]), factors(expected[1])
    square = sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in theirs)
    size = sum(float((theirs[name] ** 2).sum()) for name in theirs)
    assert square < 1e-6 * size


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3-t5"])
def test_several_text_encoders_are_shared_out(opened, tmp_path, family):
    folder = tiny.save(family, tmp_path / family, tiny_tokenizer())
    parts = {"model": Model(path=str(folder), text_encoder=True)}
    (run, found), (other, expected) = (
        opened(where, trainer, parts, gradient_checkpointing=True, steps=4)
        for where, trainer in (("shared", SHARED), ("whole", WHOLE))
    )
    train(run, found)
    train(other, expected)
    assert rows(found)[0]["loss"] == rows(expected)[0]["loss"]
    same_training(found, expected)


@pytest.mark.slow
def test_shared_weights_in_half_precision(opened):
    """Gradients are rounded in bfloat16 as well, whose steps are 2**-8 wide."""
    found, expected = (
        opened(where, trainer, precision="bf16")
        for where, trainer in (("shared", SHARED), ("whole", WHOLE))
    )
    for run, record in (found, expected):
        train(run, record)
    ours, theirs = ([float(row["loss"]) for row in rows(record)] for _, record in (found, expected))
    assert ours[0] == theirs[0]
    assert ours == pytest.approx(theirs, rel=2**-8)


def frozen(module):
    """The frozen weights, as its layers have them now."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None and not parameter.requires_grad and parameter.dim():
                yield parameter


def own(network):
    """Bytes of the frozen weights that each of its blocks is the innermost around."""
    seen, found = set(), []
    for block in blocks(network):
        ours = set(frozen(block)) - seen
        seen |= ours
        found.append(sum(p.nbytes for p in ours))
    return found


def live():
    """Bytes of all tensors there are."""
    gc.collect()
    kinds = (torch.Tensor, nn.Parameter)
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in kinds]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@pytest.mark.slow
def test_each_process_holds_its_share(opened, monkeypatch):
    """Half of each weight's rows between steps, and in the steps of the UNet a few blocks' weights.

    That is, besides what is in no block: a block, the one around it, and the next one.
    """
    held, alive, gathered, sizes, watched = {}, {}, [], {}, set()
    made, start, rows_end = (
        Training.__init__, Training.on_train_batch_start, Rows.on_train_batch_end,
    )  # fmt: skip

    def count(self, *arguments):
        made(self, *arguments)
        weights = list(frozen(self))
        sizes["shares"] = sum(-(-p.shape[0] // 2) * p[0].nbytes for p in weights)
        sizes["smallest"] = min(p.nbytes for p in weights)
        *inner, outer = own(self.diffusion.unet)
        sizes["unet"], sizes["needed"] = sum(inner) + outer, sum(sorted(inner)[-3:]) + outer

    def watch(self, batch, batch_idx):
        start(self, batch, batch_idx)
        if where == "shared":
            for factor in set(self.trained) - watched:
                factor.register_post_accumulate_grad_hook(lambda _: look_around(self))
            watched.update(self.trained)

    def look_around(module):
        weights = frozen(module.diffusion.unet)
        gathered.append(sum(p.nbytes for p in weights if not hasattr(p, "full_tensor")))

    def look(self, trainer, module, outputs, batch, batch_idx):
        rows_end(self, trainer, module, outputs, batch, batch_idx)
        kept = [p.to_local() if hasattr(p, "to_local") else p for p in frozen(module)]
        held[where] = sum(p.untyped_storage().nbytes() for p in kept)
        alive[where] = live()

    monkeypatch.setattr(Training, "__init__", count)
    monkeypatch.setattr(Training, "on_train_batch_start", watch)
    monkeypatch.setattr(Rows, "on_train_batch_end", look)
    for where, trainer in (("whole", WHOLE), ("shared", SHARED)):
        train(*opened(where, trainer, steps=3))
    assert held["shared"] == sizes["shares"] < 0.51 * held["whole"]
    # What else there is has not grown by as much as the smallest weight.
    assert alive["shared"] - held["shared"] < alive["whole"] - held["whole"] + sizes["smallest"]
    assert 0 < max(gathered) <= sizes["needed"] < sizes["unet"] / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [(SHARED, SHARED), (SHARED, ALONE), (WHOLE, SHARED)],
    ids=["shared", "to-one", "to-shared"],
)
def test_a_run_goes_on_whatever_its_processes_hold(opened, results, monkeypatch, before, after):
    run, straight = opened("straight", before)
    train(run, straight)
    run, record = opened("changed", before)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Interrupted, match="stopped after step 5 of 8, which is saved"):
            train(run, record)
    assert not multiprocessing.active_children()
    assert rows(record)[:5] == rows(straight)[:5]
    train(replace(run, trainer=after), record)
    if after == before:
        assert results(record) == results(straight)
    same_training(record, straight)


@pytest.mark.slow
def test_a_process_that_dies_or_diverges_ends_all(opened, monkeypatch, capfd):
    def kill():
        (other,) = multiprocessing.active_children()
        os.kill(other.pid, signal.SIGKILL)

    run, record = opened("dies", SHARED)
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill)
        with pytest.raises(UserError, match="process 2 of those that train together .* code -9"):
            train(run, record)
    settings = {"lr": 1e30, "grad_clip": None, "optimizer": {"kind": "sgd"}}
    run, record = opened("diverges", SHARED, **settings)
    with pytest.raises(UserError, match=r"at step \d+: .* try a smaller train.lr than 1e\+30"):
        train(run, record)
    assert not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err


def test_what_a_process_would_draw_alone_is_refused(begin):
    run, _ = begin(devices=2, sample_every=4)
    with pytest.raises(UserError, match="sample_every is 4, but trainer.strategy is 'fsdp'"):
        replace(run, trainer=SHARED)


def test_a_block_is_shared_out_after_those_in_it(tiny_sd):
    from lyco_lab.diffusion.model import load

    for network in load(tiny_sd).parts.values():
        found = blocks(network)
        assert found[-1] is network and len(found) == len(set(found)) > 2
        for place, block in enumerate(found):
            assert not set(block.modules()) & set(found[place + 1 :])
        alone = sum(p.numel() for block in found[:-1] for p in block.parameters())
        assert alone > 0.5 * sum(p.numel() for p in network.parameters())
