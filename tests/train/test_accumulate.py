"""A step of several batches is a step of their sum, and blocks computed twice change no bit."""

from pathlib import Path

import pytest
import torch

from lyco_lab.adapters.options import Options
from lyco_lab.data import cache
from lyco_lab.data.batches import Order
from lyco_lab.data.folder import read
from lyco_lab.diffusion.model import load
from lyco_lab.train.feed import Feed, parts
from lyco_lab.train.module import Training
from lyco_lab.train.recompute import recomputing
from lyco_lab.train.stage import mount

DROPPED = Options(dropout=0.3, rank_dropout=0.2, module_dropout=0.1)


@pytest.fixture
def made(begin):
    """Training and the batches of a step, of all processes together."""

    def made(ranks=1, precision=torch.float32, **settings):
        options = settings.pop("options", Options())
        run, _ = begin(**settings, **({} if "steps" in settings else {"steps": 12}))
        object.__setattr__(run, "options", options)
        diffusion = load(run.model.path, precision)
        training = Training(diffusion, mount(run, diffusion), run.train, run.optimizer_value())
        images = read(Path(run.data.folder))
        cached = cache.build(diffusion, images, text_states=not run.model.text_encoder)
        batches = []
        for rank in range(ranks):
            orders = [
                Order(images.repeats, size, run.seed, part, count)
                for size, part, count in parts(run.train, rank, ranks)
            ]
            feed = Feed(run.train, diffusion.objective, cached, orders, first=2)
            batches += [batch for batch in feed if batch.step == 2]
        return training, batches

    return made


def gradients(training, batches):
    """Of the mean loss, and that loss; as a step begins."""
    total = 0.0
    for batch in batches:
        training.on_train_batch_start(batch, 0)
        loss = training.loss(batch) / len(batches)
        loss.backward()
        total += loss.item()
    trained = {name: f for name, f in training.factors().items() if f.requires_grad}
    return total, {name: factor.grad.clone() for name, factor in trained.items()}


def distance(one, other):
    square = sum(float(((one[name] - other[name]) ** 2).sum()) for name in one)
    return (square / sum(float((one[name] ** 2).sum()) for name in one)) ** 0.5


WAYS = [
    {"batch_size": 2, "accumulate": 3},
    {"batch_size": 1, "accumulate": 6},
    {"batch_size": 6, "ranks": 2},
    {"batch_size": 2, "accumulate": 3, "ranks": 2},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_parts_see_together_what_the_whole_sees(made, way):
    _, (whole,) = made(batch_size=6, noise_offset=0.1, input_perturbation=0.1)
    _, batches = made(**way, noise_offset=0.1, input_perturbation=0.1)
    batches.sort(key=lambda batch: batch.part)
    assert [batch.part for batch in batches] == list(range(len(batches)))
    for name in ("indices_B", "latents_BCHW", "noise_BCHW", "timesteps_B", "perturbation_BCHW"):
        seen = torch.cat([getattr(batch, name) for batch in batches])
        assert torch.equal(seen, getattr(whole, name)), name
    assert torch.equal(torch.cat([b.text["hidden"] for b in batches]), whole.text["hidden"])
    assert sum(batch.last for batch in batches) == way.get("ranks", 1)


@pytest.mark.parametrize("options", [Options(), DROPPED], ids=["plain", "dropped"])
def test_the_mean_gradient_of_parts_is_that_of_the_whole(made, options):
    settings = {"text_encoder": True, "options": options, "adapter": {"kind": "loha", "rank": 4}}
    loss, whole = gradients(*made(batch_size=6, **settings))
    for way in WAYS[:3]:
        found, parted = gradients(*made(**way, **settings))
        assert found == pytest.approx(loss, rel=1e-5)  # of a float32's 1e-7, over a whole model
        assert distance(whole, parted) < 1e-4
    # A mask that does not know its part, and another step, are far away.
    training, batches = made(batch_size=2, accumulate=3, **settings)
    wrong = [batch._replace(part=0) for batch in batches]
    if options.dropout:
        assert distance(whole, gradients(training, wrong)[1]) > 1e-2
    assert distance(whole, gradients(*made(batch_size=6, seed=1, **settings))[1]) > 1e-2


def test_a_run_in_small_batches_is_the_run_in_large_ones(trained):
    from tests.train.test_stage import rows

    settings = {"steps": 6, "lr": 1e-2, "checkpoint_every": 4, "noise_offset": 0.1}
    _, whole = trained("whole", batch_size=6, **settings)
    _, parted = trained("parted", batch_size=2, accumulate=3, **settings)
    _, other = trained("other", batch_size=2, **settings)
    assert [row["step"] for row in rows(parted)] == list("123456")
    for key in ("loss", "grad_norm", "lr"):
        found, expected = ([float(row[key]) for row in rows(r)] for r in (parted, whole))
        assert found == pytest.approx(expected, rel=1e-3)
    losses = [[float(row["loss"]) for row in rows(r)] for r in (other, whole)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


class Kept:
    """The bytes that autograd keeps for the backward pass, but for parameters."""

    def __init__(self, parameters):
        self.seen = {p.data_ptr() for p in parameters}
        self.bytes = 0

    def pack(self, tensor):
        if tensor.data_ptr() not in self.seen:
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("adapter", ["lora", "tlora", "dora"])
def test_computing_blocks_twice_changes_no_bit_and_keeps_less(made, adapter):
    settings = {"text_encoder": True, "options": DROPPED, "adapter": {"kind": adapter}}
    if adapter == "dora":
        settings["options"] = Options(module_dropout=0.3)
    training, (batch,) = made(batch_size=3, **settings)
    with Kept(training.parameters()) as usual:
        loss, expected = gradients(training, [batch])
    training, (batch,) = made(batch_size=3, **settings)
    with recomputing(list(training.diffusion.parts.values())), Kept(training.parameters()) as less:
        again, found = gradients(training, [batch])
    assert again == loss
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert less.bytes < 0.7 * usual.bytes


def test_the_text_encoder_s_blocks_are_computed_twice_too(made, monkeypatch):
    from transformers.models.clip.modeling_clip import CLIPMLP

    calls = []
    forward = CLIPMLP.forward
    monkeypatch.setattr(CLIPMLP, "forward", lambda *a: calls.append(1) or forward(*a))
    training, (batch,) = made(batch_size=1, text_encoder=True)
    models = list(training.diffusion.parts.values())
    gradients(training, [batch])
    once, modes = len(calls), [module.training for module in training.modules()]
    with recomputing(models):
        gradients(training, [batch])
    assert len(calls) == 3 * once
    assert [module.training for module in training.modules()] == modes
    gradients(training, [batch])
    assert len(calls) == 4 * once


def test_a_run_that_computes_twice_is_the_same_run(trained, results):
    _, plain = trained("plain", steps=4, text_encoder=True)
    _, twice = trained("twice", steps=4, text_encoder=True, gradient_checkpointing=True)
    assert results(plain)[1] == results(twice)[1]
