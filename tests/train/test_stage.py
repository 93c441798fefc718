"""A whole training: what it leaves, what it repeats exactly, and what does not disturb it."""

import copy
import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image

from lyco_lab.config.groups import Group
from lyco_lab.data.stage import prepare
from lyco_lab.diffusion.model import load
from lyco_lab.errors import UserError
from lyco_lab.formats import kohya
from lyco_lab.record import Record
from lyco_lab.train import stage, train
from lyco_lab.train.callbacks import Rows
from lyco_lab.train.module import Training
from tests.short_of_memory import limited
from tests.wandb_offline import offline_runs


def rows(record):
    with (record.path / "train" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def factors(record):
    parts, _ = kohya.load(record.path / "adapter.safetensors")
    return {
        f"{part}.{layer}.{suffix}": tensor
        for part, layers in parts.items()
        for layer, tensors in layers.items()
        for suffix, tensor in tensors.items()
    }


def test_every_step_has_its_row(trained):
    run, record = trained(steps=12, warmup_steps=4, lr=8e-3)
    found = rows(record)
    assert [int(row["step"]) for row in found] == list(range(1, 13))
    assert [float(row["lr"]) for row in found[:5]] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 8e-3])
    assert all(math.isfinite(float(row["loss"])) for row in found)
    assert all(float(row["grad_norm"]) > 0 for row in found)
    assert [row["step"] for row in found if row["delta_norm"]] == ["10", "12"]
    assert all(row["lr_text_encoder"] == "" for row in found)


def test_the_file_is_what_was_trained(trained):
    run, record = trained()
    unet = load(run.model.path).unet
    base = {name: weight.clone() for name, weight in unet.state_dict().items()}
    mounted = kohya.apply(record.path / "adapter.safetensors", {"unet": unet})["unet"]
    assert math.hypot(*mounted.norms().values()) == float(rows(record)[-1]["delta_norm"])
    mounted.merge()
    moved = [n for n, w in unet.state_dict().items() if not torch.equal(w, base[n])]
    assert len(moved) == record.facts("train")["layers"]["unet"] == len(mounted.layers)


def test_norms_train_beside_the_adapter_and_are_in_the_file(trained):
    quick = {"steps": 6, "lr": 1e-2}
    (_, plain), (run, record) = trained("a", **quick), trained("b", train_norm=True, **quick)
    facts, before = record.facts("train"), plain.facts("train")
    found = {name: f for name, f in factors(record).items() if name.endswith("_norm")}
    assert facts["trainable_params"] - before["trainable_params"] == sum(
        f.numel() for f in found.values()
    )
    assert facts["layers"]["unet"] - before["layers"]["unet"] == len(found) // 2 > 0
    assert all(factor.any() for factor in found.values())
    unet = load(run.model.path).unet
    norms = {n: m for n, m in unet.named_modules() if "norm" in n.rpartition(".")[2]}
    base = {name: copy.deepcopy(norm.state_dict()) for name, norm in norms.items()}
    mounted = kohya.apply(record.path / "adapter.safetensors", {"unet": unet})["unet"]
    assert math.hypot(*mounted.norms().values()) == float(rows(record)[-1]["delta_norm"])
    mounted.merge()
    for name in norms.keys() & mounted.layers.keys():
        for key, now in unet.get_submodule(name).state_dict().items():
            gain = found[f"unet.{kohya.file_layer('unet', name)}.{key[0]}_norm"]  # w, b
            assert torch.equal(now, base[name][key] + gain)


def test_a_group_reaches_the_norms_alone(trained):
    """As fast as without it, but for the norms, which learn nothing to speak of."""
    slow = Group(layers=("unet.*norm*",), lr=2.0**-30)
    _, record = trained(train_norm=True, steps=4, groups=(slow,))
    found = factors(record)
    norms = [f for name, f in found.items() if name.endswith("_norm")]
    assert norms and max(f.abs().max() for f in norms) < 1e-9
    assert all(f.abs().max() > 1e-5 for n, f in found.items() if n.endswith("weight"))


def test_the_file_says_how_it_was_trained_and_not_where(trained, tmp_path, tiny_sd):
    run, record = trained()
    _, metadata = kohya.load(record.path / "adapter.safetensors")
    assert metadata["ss_steps"] == "12" and metadata["ss_seed"] == "0"
    assert metadata["modelspec.trigger_phrase"] == "sks circle"
    assert run.hash in metadata["lyco_lab.run"]
    assert not any(str(place) in str(metadata) for place in (tmp_path, tiny_sd.parent))


def test_facts_say_what_it_cost(trained):
    _, record = trained()
    facts = record.facts("train")
    assert facts["trainable_params"] > 0 and facts["train_seconds"] > 0
    assert (facts["steps"], facts["threads"], facts["device"]) == (12, 1, "cpu")


def test_the_same_run_twice_is_the_same_to_the_last_bit(trained, results):
    assert results(trained("a")[1]) == results(trained("b")[1])


def test_another_seed_is_another_run(trained):
    one, other = rows(trained("a", steps=4)[1]), rows(trained("b", steps=4, seed=1)[1])
    assert all(a["loss"] != b["loss"] for a, b in zip(one, other, strict=True))


def test_the_surroundings_are_left_as_they_were(begin):
    run, record = begin(steps=4)
    torch.manual_seed(3)
    random, numpy_random = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(run, record)
    assert torch.equal(torch.get_rng_state(), random)
    assert (np.random.get_state()[1] == numpy_random).all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.is_grad_enabled()


def test_a_stage_that_is_done_does_nothing(trained, monkeypatch):
    run, record = trained(steps=4)
    (record.path / "adapter.safetensors").unlink()
    monkeypatch.setattr("lyco_lab.train.stage.load", None)
    train(run, record)
    assert not (record.path / "adapter.safetensors").exists()


def test_samples_are_drawn_and_disturb_nothing(trained, results):
    run, plain = trained("a", steps=6)
    _, sampled = trained("b", steps=6, sample_every=2)
    assert factors(plain).keys() == factors(sampled).keys()
    for name, factor in factors(plain).items():
        assert torch.equal(factor, factors(sampled)[name])
    assert rows(plain) == rows(sampled)
    files = sorted((sampled.path / "train" / "samples").iterdir())
    assert [f.name for f in files] == [f"step0000000{n}.png" for n in (2, 4, 6)]
    with Image.open(files[0]) as image:
        assert image.size == (3 * 64, 64)  # three different captions
    assert not (plain.path / "train" / "samples").exists()


@pytest.mark.parametrize("fit", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_samples_that_do_not_fit_into_memory_disturb_nothing(trained, monkeypatch, capsys, fit):
    """Drawn one by one, or else left out, which is said once."""
    settings = {"steps": 6, "ema_decay": 0.8, "batch_size": 1}
    _, plain = trained("a", **settings)
    opened = stage.load

    def small(*arguments):
        diffusion = opened(*arguments)
        limited(monkeypatch, diffusion.vae, "decode", fit)
        return diffusion

    monkeypatch.setattr(stage, "load", small)
    _, sampled = trained("b", **settings, sample_every=2)
    assert rows(plain) == rows(sampled)
    for name, factor in factors(plain).items():
        assert torch.equal(factor, factors(sampled)[name])
    files = list((sampled.path / "train").glob("samples/*.png"))
    said = capsys.readouterr().out
    assert said.count("while decoding 3 images at once: now 2") == 1
    assert (len(files), said.count("training goes on without samples from step 2 on")) == (
        (3, 0) if fit else (0, 1)
    )


def test_the_average_is_what_is_exported(begin, monkeypatch):
    run, record = begin(ema_decay=0.8, steps=6)
    start: dict[str, torch.Tensor] = {}
    after: list[dict[str, torch.Tensor]] = []
    made, rows_end = Training.__init__, Rows.on_train_batch_end

    def copies(module):
        return {name: factor.detach().clone() for name, factor in module.factors().items()}

    def remember_start(self, *args):
        made(self, *args)
        start.update(copies(self))

    def remember(self, trainer, module, outputs, batch, batch_idx):
        after.append(copies(module))
        rows_end(self, trainer, module, outputs, batch, batch_idx)

    monkeypatch.setattr(Training, "__init__", remember_start)
    monkeypatch.setattr(Rows, "on_train_batch_end", remember)
    train(run, record)

    expected = start
    for factors_ in after:
        expected = {n: 0.8 * value + 0.2 * factors_[n] for n, value in expected.items()}
    assert len(after) == 6
    unet = load(run.model.path).unet
    mounted = kohya.apply(record.path / "adapter.safetensors", {"unet": unet})["unet"]
    for name, factor in mounted.named_factors().items():
        torch.testing.assert_close(factor.detach(), expected[f"unet.{name}"], atol=1e-7, rtol=1e-6)
        assert not torch.equal(factor, after[-1][f"unet.{name}"])


def test_a_trained_text_encoder_is_in_the_file_and_the_rows(trained):
    run, record = trained(text_encoder=True, lr=8e-3, text_encoder_lr=2e-3, warmup_steps=0)
    assert any(key.startswith("text_encoder.lora_te_text_model_") for key in factors(record))
    assert {row["lr_text_encoder"] for row in rows(record)} == {"0.002"}
    diffusion = load(run.model.path)
    mounted = kohya.apply(record.path / "adapter.safetensors", diffusion.parts)
    assert all(norm > 0 for m in mounted.values() for norm in m.norms().values())


@pytest.mark.parametrize("carry", ["all", "zero"])
@pytest.mark.parametrize("grad_clip", [None, 2.0**-9])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_power_of_two_in_gamma_can_be_folded_away_bit_for_bit(
    begin, trained, kind, grad_clip, carry
):
    """gamma = 1/4, degree 2: all settings move by powers of s = 1/2, or those of B by 1/4's."""
    from lyco_lab.gamma import rewrite

    settings = {
        "adapter": {"kind": "lora", "rank": 4, "alpha": 1.0},
        "optimizer": {"kind": kind, "weight_decay": 0.01},
        "lr": 2e-2,
        "grad_clip": grad_clip,
    }
    run, one = trained("a", **settings)
    moved = rewrite(run, carry=carry)
    other = Record.open(one.path.parents[1] / "b", moved)
    prepare(moved, other)
    train(moved, other)
    assert moved.adapter_value().gamma((8, 8)) == 1
    assert [row["loss"] for row in rows(one)] == [row["loss"] for row in rows(other)]
    assert [row["delta_norm"] for row in rows(one)] == [row["delta_norm"] for row in rows(other)]
    assert float(rows(one)[-1]["delta_norm"]) > 0
    if grad_clip is not None:
        assert all(float(row["grad_norm"]) > grad_clip for row in rows(one))


def test_lightning_says_nothing_of_its_own(trained, capfd, recwarn):
    trained(steps=4)
    said = "".join(capfd.readouterr())
    assert "lora: train" in said and "4/4" in said
    for remark in ("Tip", "GPU", "TPU", "litlogger", "Trainer", "max_epochs", "wandb"):
        assert remark not in said
    assert not list(recwarn)


def test_captions_that_are_cut_are_counted(begin, tiny_concept, monkeypatch, capsys):
    from lyco_lab.diffusion.model import Diffusion

    monkeypatch.setattr(Diffusion, "too_long", lambda self, text: "green" in text)
    train(*begin(steps=4))
    assert "2 of 6 captions are longer than the text encoder reads" in capsys.readouterr().out


def test_w_and_b_is_told_what_the_folder_holds(trained):
    run, record = trained(steps=10, wandb="offline", sample_every=10)
    (offline,) = offline_runs(record.path)
    logged = [row for row in offline.history if "train/loss" in row]
    for ours, theirs in zip(rows(record), logged, strict=True):
        assert theirs["trainer/global_step"] == int(ours["step"])
        assert theirs["train/loss"] == float(ours["loss"])
        assert theirs["lr/unet"] == float(ours["lr"])
        assert theirs["train/grad_norm"] == float(ours["grad_norm"])
    assert logged[-1]["train/delta_norm"] == float(rows(record)[-1]["delta_norm"])
    assert any("samples" in row for row in offline.history)
    (artifact,) = offline.artifacts
    assert artifact.type == "model"
    assert (
        artifact.manifest.contents[0].size == (record.path / "adapter.safetensors").stat().st_size
    )
    assert offline.config["trainable_params"] == record.facts("train")["trainable_params"]
    assert offline.config["threads"] == 1
    assert offline.run.job_type == "train"


def test_a_file_where_the_folder_should_be_is_named(begin):
    run, record = begin(steps=4)
    (record.path / "train").write_text("in the way")
    with pytest.raises(UserError, match="cannot write in .*train"):
        train(run, record)
