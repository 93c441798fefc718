"""`import lyco_lab as ll`: light, complete, and enough for an adapter from its start to a merge."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import lyco_lab as ll
from lyco_lab.adapters import ADAPTERS
from lyco_lab.optimizers import OPTIMIZERS
from tests.strategies import move

ROOT = Path(__file__).parents[1]
LAYERS = ["*.attn?.to_?"]


def test_importing_it_loads_nothing_heavy():
    heavy = ("torch", "numpy", "diffusers", "lightning", "pandas", "sympy", "wandb", "omegaconf")
    code = f"import sys, lyco_lab; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there():
    for name in ll.__all__:
        assert getattr(ll, name) is not None and name in dir(ll)
    for kind in (*ADAPTERS.values(), *OPTIMIZERS.values()):
        assert getattr(ll, kind.__name__) is kind and kind.__name__ in dir(ll)
    assert len({kind.__name__ for kind in (*ADAPTERS.values(), *OPTIMIZERS.values())}) == len(
        ADAPTERS
    ) + len(OPTIMIZERS)


def test_a_misspelt_name_is_told_the_nearest():
    with pytest.raises(AttributeError, match="no attribute 'atach'.*attach"):
        _ = ll.atach
    with pytest.raises(AttributeError):
        _ = ll.__wrapped__  # what tools look for is no cause to import everything
    with pytest.raises(ImportError):
        from lyco_lab import LoRa  # noqa: F401


@pytest.fixture
def pipe(tiny_sd):
    return StableDiffusionPipeline.from_pretrained(tiny_sd)


def weights(pipe):
    return {
        f"{part}.{name}": value.clone()
        for part in ("unet", "text_encoder")
        for name, value in getattr(pipe, part).state_dict().items()
    }


def test_from_a_start_to_a_merge(pipe, tiny_sd, tmp_path):
    before = weights(pipe)
    mounted = {
        "unet": ll.attach(pipe.unet, ll.LoRA(rank=2), LAYERS, seed=0),
        "text_encoder": ll.attach(pipe.text_encoder, ll.LoKr(), ["*.q_proj"], seed=0),
    }
    for part in mounted.values():
        move(part, 1, size=0.1)
    path = str(tmp_path / "adapter.safetensors")
    ll.save(path, mounted, {"note": "of a test"})

    other = StableDiffusionPipeline.from_pretrained(tiny_sd)
    loaded = ll.load(path, other)
    assert loaded.keys() == mounted.keys()
    for part, ours in mounted.items():
        state = ours.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in loaded[part].state_dict().items())
    ll.merge(loaded)
    ll.merge(mounted)
    assert (merged := weights(other)).keys() == before.keys()
    for name, value in weights(pipe).items():
        assert torch.equal(value, merged[name])
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {
        f"{part}.{layer}.weight" for part, ours in mounted.items() for layer in ours.layers
    }
    for part in loaded.values():
        part.unmerge()
        part.detach()
    assert all(torch.equal(value, before[name]) for name, value in weights(other).items())


def test_where_one_part_cannot_be_merged_none_is(pipe):
    mounted = {
        "text_encoder": ll.attach(pipe.text_encoder, ll.LoRA(rank=2), ["*.q_proj"], seed=0),
        "unet": ll.attach(pipe.unet, ll.TLoRA(rank=4, min_rank=2), LAYERS, seed=0),
    }
    move(mounted["text_encoder"], 1, size=0.1)
    before = weights(pipe)
    with pytest.raises(ll.UserError, match="depends on the timestep"):
        ll.merge(mounted)
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


def test_tensors_that_nobody_understands_are_an_error(pipe, tiny_sd, tmp_path):
    from safetensors.torch import load_file, save_file

    mounted = ll.attach(pipe.unet, ll.LoRA(rank=2), LAYERS, seed=0)
    path = tmp_path / "adapter.safetensors"
    ll.save(path, {"unet": mounted})
    tensors = load_file(path) | {"lora_unet_nowhere.lora_down.weight": torch.zeros(2, 4)}
    save_file(tensors, path)  # without metadata: another program's
    other = StableDiffusionPipeline.from_pretrained(tiny_sd)
    before = list(other.unet.state_dict())
    with pytest.raises(
        ll.UserError, match=r"has 1 of \d+ tensors.*lora_unet_nowhere.*partial=True"
    ):
        ll.load(path, other)
    assert list(other.unet.state_dict()) == before
    assert ll.load(path, {"unet": other.unet}, partial=True)["unet"].layers.keys()


@pytest.mark.parametrize("model", [3, {}, {"vae": None}])
def test_what_is_no_model_is_said(tmp_path, model):
    from lyco_lab.formats.files import parts

    with pytest.raises(ll.UserError, match="needs a diffusers pipeline|needs one of unet"):
        parts(model)


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "adapter.safetensors").is_file()
