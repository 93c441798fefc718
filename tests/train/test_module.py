"""The loss against its definition, and what a step changes."""

import csv
from pathlib import Path

import pytest
import torch

from lyco_lab.data import cache
from lyco_lab.data.batches import Batches, Order
from lyco_lab.data.folder import read
from lyco_lab.diffusion.model import load
from lyco_lab.formats import kohya
from lyco_lab.train.module import Training
from lyco_lab.train.stage import mount


@pytest.fixture
def module(begin):
    """Training as the stage builds it, and one batch."""

    def module(**settings):
        run, _ = begin(**settings)
        diffusion = load(run.model.path)
        return Training(
            diffusion, mount(run, diffusion), run.train, run.optimizer_value()
        ), batches_of(run, diffusion, 1)[0]

    return module


def batches_of(run, diffusion, count):
    dataset = read(Path(run.data.folder))
    cached = cache.build(diffusion, dataset, text_states=not run.model.text_encoder)
    order = Order(dataset.repeats, run.train.batch_size, run.seed)
    return list(Batches(cached, order, 0, count, timesteps=1000, caption_dropout=0.0))


def loss_naive(diffusion, batch, captions):
    """The definition, one image at a time, from the text itself."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    remaining = torch.cumprod(1 - betas, 0)
    losses = []
    for z, e, t, i in zip(
        batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B, batch.indices_B, strict=True
    ):
        a = remaining[t]
        noisy = (a.sqrt() * z + (1 - a).sqrt() * e).float()
        text = diffusion.encode_text([captions[i]])["hidden"]
        predicted = diffusion.unet(noisy[None], t[None], text).sample[0]
        losses.append(((predicted - e) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_loss_matches_its_definition(module, tiny_concept, text_encoder):
    training, batch = module(text_encoder=text_encoder)
    captions = read(tiny_concept).captions
    expected = loss_naive(training.diffusion, batch, captions)
    torch.testing.assert_close(training.loss(batch), expected, atol=1e-4, rtol=1e-4)


def test_only_factors_receive_gradients(module):
    training, batch = module(text_encoder=True)
    training.loss(batch).backward()
    factors = {id(f) for f in training.factors().values()}
    for parameter in training.parameters():
        assert (parameter.grad is not None) == (id(parameter) in factors)


def test_a_text_encoder_that_does_not_train_gets_no_factors(module):
    training, _ = module()
    assert set(training.mounted) == {"unet"}
    assert all(name.startswith("unet.") for name in training.factors())


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-2},
        {"optimizer": {"kind": "sgd"}, "lr": 10.0},
        {"optimizer": {"kind": "sgd", "momentum": 0.9}, "lr": 1.0},
        {"lr": 1e-2, "text_encoder": True, "text_encoder_lr": 1e-3},
        {"lr": 1e-2, "adapter": {"kind": "loha"}},
        {"lr": 1e-2, "adapter": {"kind": "lokr", "factor": 4}},
        {"lr": 2e-3, "adapter": {"kind": "native"}},
        {"lr": 1e-2, "precision": "bf16"},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_training_lowers_the_loss(trained, settings):
    """Against the frozen model's on the very same batches, noise included."""
    run, record = trained(caption_dropout=0.0, **settings)
    with (record.path / "train" / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    diffusion = load(run.model.path)
    frozen = Training(diffusion, mount(run, diffusion), run.train, run.optimizer_value())
    with torch.no_grad():
        before = [frozen.loss(batch).item() for batch in batches_of(run, diffusion, 12)]
    assert losses[0] == pytest.approx(before[0], rel=1e-2)  # bfloat16 has two digits
    assert sum(losses[-4:]) < 0.998 * sum(before[-4:])


def test_the_frozen_model_stays_as_it_was_and_in_evaluation_mode(begin, monkeypatch):
    run, record = begin(steps=2, warmup_steps=0)
    seen = []
    loss = Training.loss

    def watched(self, batch):
        seen.append(self)
        assert not self.diffusion.unet.training and not self.diffusion.text_encoder.training
        return loss(self, batch)

    monkeypatch.setattr(Training, "loss", watched)
    from lyco_lab.train import train

    train(run, record)
    unet = seen[0].diffusion.unet
    for mounted in seen[0].mounted.values():
        mounted.detach()
    for name, weight in load(run.model.path).unet.state_dict().items():
        assert torch.equal(unet.state_dict()[name], weight)


def test_factors_are_float32_in_a_half_precision_model(trained):
    _, record = trained(steps=2, warmup_steps=0, precision="bf16")
    parts, _ = kohya.load(record.path / "adapter.safetensors")
    dtypes = {t.dtype for layers in parts.values() for ts in layers.values() for t in ts.values()}
    assert dtypes == {torch.float32}


def test_state_and_load_state_are_inverse(module):
    training, batch = module(ema_decay=0.5)
    other, _ = module(ema_decay=0.5)
    for _ in range(3):
        training.loss(batch).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.average.update()
    other.load_state(training.state(3, 1.0))
    for ours, theirs in zip(training.factors().values(), other.factors().values(), strict=True):
        assert torch.equal(ours, theirs)
    for name, value in training.average.values.items():
        assert torch.equal(value, other.average.values[name])
    before, after = training.optimizer.state_dict(), other.optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, moments in before["state"].items():
        for name, moment in moments.items():
            assert torch.equal(moment, after["state"][index][name])
