"""kohya files that do not fit, or are none: each refused by name, with nothing changed."""

import copy
import os

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.errors import UserError
from lyco_lab.formats import foreign, kohya


def one_layer(tmp_path, **metadata):
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "linear": nn.Linear(4, 6)})
    mounted = attach(model, LoRA(rank=2), ["conv", "linear"], seed=0)
    path = tmp_path / "a.safetensors"
    kohya.save(path, {"unet": mounted}, metadata)
    mounted.detach()
    return path, model


def rewrite(path, change):
    """The same file with its tensors changed."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["lyco_lab.digest"]  # or it is a damaged file, whatever was changed
    tensors = safetensors.torch.load_file(path)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t, m: rename(t, "lora_unet_conv.alpha", "conv.alpha"),
            "holds 'conv.alpha': an adapter's keys begin with one of lora_unet_",
        ),
        (
            lambda t, m: [rename(t, k, k.replace("linear", "linaer")) for k in list(t)],
            r"ModuleDict has no layer 'lora_unet_linaer' \(did you mean 'lora_unet_linear'\?\)",
        ),
        (lambda t, m: t.pop("lora_unet_conv.lora_up.weight"), "needs 'lora_up.weight', the file"),
        (
            lambda t, m: t.update({"lora_unet_conv.lora_up.weight": torch.ones(7, 2)}),
            r"'lora_up.weight' has shape \(7, 2\).*needs \(6, 2\)",
        ),
        (lambda t, m: t["lora_unet_conv.alpha"].fill_(3.0), "alpha is 3.0, but LoRA.*means 4.0"),
        (lambda t, m: t.pop("lora_unet_conv.alpha"), "alpha is None"),
        (
            lambda t, m: t.update({"lora_unet_conv.dora_scale": torch.ones(6)}),
            r"has no use for \['dora_scale'\]",
        ),
        (lambda t, m: m.pop("lyco_lab.adapter"), "no 'lyco_lab.adapter' in its metadata"),
        (
            lambda t, m: m.update({"lyco_lab.adapter": '{"unet": {"kind": "lora2"}}'}),
            r"unknown adapter 'lora2' \(did you mean 'lora'\?\)",
        ),
        (
            lambda t, m: m.update({"lyco_lab.adapter": '{"unet": {"kind": "lora", "rnak": 2}}'}),
            "its lora was written with other fields.*rnak",
        ),
        (
            lambda t, m: m.update({"lyco_lab.adapter": "{}"}),
            "adapts the unet, but no adapter is in its 'lyco_lab.adapter'",
        ),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(change, words, tmp_path):
    path, model = one_layer(tmp_path)
    rewrite(path, change)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=words):
        kohya.apply(path, {"unet": model})
    assert type(model["conv"]) is nn.Conv2d
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_part_without_a_model_is_refused_and_a_model_without_a_part_stays(tmp_path):
    path, model = one_layer(tmp_path)
    with pytest.raises(ValueError, match="adapts the unet, but no model was given for it"):
        kohya.apply(path, {"text_encoder": model})
    other = copy.deepcopy(model)
    assert kohya.apply(path, {"unet": model, "text_encoder": other}).keys() == {"unet"}
    assert type(other["conv"]) is nn.Conv2d


def test_parts_are_left_out_if_that_is_asked_for(tmp_path):
    models = {part: nn.ModuleDict({"fc": nn.Linear(4, 6)}) for part in ("unet", "text_encoder")}
    mounted = {p: attach(model, LoRA(rank=2), ["fc"], seed=0) for p, model in models.items()}
    path = tmp_path / "a.safetensors"
    kohya.save(path, mounted, {})
    for each in mounted.values():
        each.detach()
    with pytest.raises(UserError, match="adapts the text_encoder, but no .*partial=True leaves"):
        kohya.apply(path, {"unet": models["unet"]})
    applied, report = foreign.apply(path, {"unet": models["unet"]}, partial=True)
    assert applied.keys() == {"unet"}
    assert {line.key for line in report if not line.used} == {
        f"lora_te_text_model_fc.{suffix}" for suffix in ("alpha", "lora_up.weight",
                                                         "lora_down.weight")
    }  # fmt: skip
    with pytest.raises(UserError, match="there is nothing to mount"):
        kohya.apply(path, {"vae": models["unet"]}, partial=True)


def test_what_is_no_adapter_file_is_refused_and_kept(tmp_path):
    _, model = one_layer(tmp_path)
    mounted = attach(model, LoRA(rank=2), ["conv"], seed=0)
    foreign, text = tmp_path / "foreign.safetensors", tmp_path / "notes.txt"
    safetensors.torch.save_file({"x": torch.ones(1)}, foreign)
    text.write_text("keep me")
    for path in (foreign, text):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=path.name):
            kohya.save(path, {"unet": mounted}, {})
        with pytest.raises(ValueError, match=path.name):
            kohya.apply(path, {"unet": model})
        assert path.read_bytes() == before
    with pytest.raises(ValueError, match="cannot read .*missing.safetensors: no such file"):
        kohya.load(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="no part carries an adapter"):
        kohya.save(tmp_path / "b.safetensors", {}, {})
    with pytest.raises(ValueError, match="unknown part 'vae'.*unet"):
        kohya.save(tmp_path / "b.safetensors", {"vae": mounted}, {})


def test_layers_that_the_layout_cannot_tell_apart_are_refused(tmp_path):
    model = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    mounted = attach(model, LoRA(rank=2), ["a_b", "a.b"], seed=0)
    with pytest.raises(ValueError, match="two layers of the unet are both lora_unet_a_b"):
        kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {})
    assert os.listdir(tmp_path) == []


def test_a_model_whose_layers_the_layout_cannot_tell_apart_is_refused(tmp_path):
    """Only where the file has a layer of that name."""
    path, _ = one_layer(tmp_path)
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(4, 6, 3), "linear": nn.Linear(4, 6), "a_b": nn.Linear(4, 4)}
    )
    model["a"] = nn.ModuleDict({"b": nn.Linear(4, 4)})
    kohya.apply(path, {"unet": model})["unet"].detach()
    rewrite(path, lambda t, m: [rename(t, k, k.replace("linear", "a_b")) for k in list(t)])
    with pytest.raises(ValueError, match="a_b and a.b of ModuleDict are 'lora_unet_a_b'"):
        kohya.apply(path, {"unet": model})


@pytest.mark.parametrize("value", [1e6, -1e6])
def test_a_factor_that_overflows_is_refused_and_nothing_written(value, tmp_path):
    model = nn.ModuleDict({"linear": nn.Linear(4, 6)})
    mounted = attach(model, LoRA(rank=2), ["linear"], seed=0)
    with torch.no_grad():
        mounted.factors("linear")["b_PR"][3, 1] = value
    with pytest.raises(ValueError, match=r"lora_up.weight holds 1e\+06, more than torch.float16"):
        kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {}, dtype=torch.float16)
    assert os.listdir(tmp_path) == []
    kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {}, dtype=torch.bfloat16)
