"""Numbers that are not finite stop the run, and are traced to a layer."""

import math

import pytest
import torch

from lyco_lab.errors import UserError
from lyco_lab.formats import kohya
from lyco_lab.train import guard, train
from lyco_lab.train.callbacks import Rows
from lyco_lab.train.checkpoint import read
from lyco_lab.train.module import Training


def after_step(monkeypatch, step, do):
    """Call do(module) once `step` is done."""
    rows = Rows.on_train_batch_end

    def hooked(self, trainer, module, outputs, batch, batch_idx):
        rows(self, trainer, module, outputs, batch, batch_idx)
        if batch.step + 1 == step:
            do(module)

    monkeypatch.setattr(Rows, "on_train_batch_end", hooked)


def test_a_factor_that_is_not_finite_is_named(begin, monkeypatch):
    run, record = begin()
    names = []

    def poison(module):
        name, factor = list(module.factors().items())[9]
        factor.data[0, 0] = math.nan
        names.append(name)

    after_step(monkeypatch, 6, poison)
    with pytest.raises(UserError) as error:
        train(run, record)
    assert f"the loss is nan at step 7: the factor {names[0]} is not finite" in str(error.value)
    assert "train/not-finite.ckpt" in str(error.value)
    assert not record.done("train")
    assert len((record.path / "train" / "metrics.csv").read_text().splitlines()) == 1 + 6


def test_the_layer_whose_output_overflows_first_is_named(begin, monkeypatch):
    run, record = begin()
    chosen = []

    def blow_up(module):
        mounted = module.mounted["unet"]
        name = list(mounted.layers)[20]
        for factor in mounted.factors(name).values():
            factor.data.fill_(1e25)
        chosen.append(name)

    after_step(monkeypatch, 6, blow_up)
    with pytest.raises(UserError, match="at step 7: the output of the layer unet") as error:
        train(run, record)
    assert f"the layer unet.{chosen[0]} is not finite" in str(error.value)


def test_a_gradient_that_is_not_finite_is_named(begin, monkeypatch):
    run, record = begin()
    names = []
    loss = Training.loss

    def with_bad_gradient(self, batch):
        name, factor = list(self.factors().items())[5]
        names.append(name)
        return loss(self, batch) + (factor.flatten()[0] * 0).sqrt()  # 0, with slope infinity

    monkeypatch.setattr(Training, "loss", with_bad_gradient)
    with pytest.raises(UserError) as error:
        train(run, record)
    assert "the norm of the gradients is nan at step 1" in str(error.value)
    assert f"the gradient of {names[0]} is not finite" in str(error.value)


def test_a_learning_rate_that_is_far_too_large_ends_with_advice(begin):
    run, record = begin(optimizer={"kind": "sgd"}, lr=1e30, grad_clip=None, steps=40)
    with pytest.raises(UserError, match=r"at step \d+: .* try a smaller train.lr than 1e\+30"):
        train(run, record)


def test_the_state_is_saved_and_no_run_goes_on_from_it(begin, monkeypatch):
    run, record = begin()
    kept, loss = {}, Training.loss

    def poison(module):
        kept.update({n: f.detach().clone() for n, f in module.factors().items()})
        module.settings.__dict__["grad_clip"] = math.nan  # the factors stay as they are
        monkeypatch.setattr(Training, "loss", lambda self, batch: loss(self, batch) + math.inf)

    after_step(monkeypatch, 6, poison)
    with pytest.raises(UserError, match="loss is inf at step 7: every adapted layer's .* finite"):
        train(run, record)
    saved = read(record.path / "train" / guard.FILE)
    assert saved.step == 6
    for name, value in saved.factors["unet"].items():
        assert torch.equal(value, kept[f"unet.{name}"])
    monkeypatch.undo()
    train(run, record)  # from step 4, where the last checkpoint is
    assert record.done("train")
    assert kohya.load(record.path / "adapter.safetensors")


def test_of_several_micro_batches_the_bad_one_is_looked_into(begin, monkeypatch):
    """All of a step's numbers are read at its end; a later micro-batch was fine."""
    run, record = begin(accumulate=2, batch_size=2)
    loss, seen = Training.loss, []

    def bad_once(self, batch):
        found = loss(self, batch)
        if batch.step == 2 and not batch.last:
            seen.append([mounted.part for mounted in self.mounted.values()])
            return found + math.nan
        return found

    monkeypatch.setattr(Training, "loss", bad_once)
    with pytest.raises(UserError, match="the loss is nan at step 3: every adapted layer's"):
        train(run, record)
    assert seen == [[0], [0]]  # in the step, and when it was looked for
    assert len((record.path / "train" / "metrics.csv").read_text().splitlines()) == 1 + 2


def test_gradients_that_overflow_together_are_said_to(begin, monkeypatch):
    def grow(module):
        for factor in module.factors().values():
            factor.register_hook(lambda gradient: gradient * 0 + 1e37)

    after_step(monkeypatch, 2, grow)
    run, record = begin(grad_clip=1.0)
    with pytest.raises(UserError, match="each gradient is finite, but their squares together"):
        train(run, record)
