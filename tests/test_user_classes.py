"""Adapters and optimizers of a user's own, named by package.module.Class."""

import importlib
import itertools
import sys
import textwrap

import pytest
import torch
from torch import nn

from lyco_lab import adapters, optimizers
from lyco_lab.adapters.mount import attach
from lyco_lab.config import load_study
from lyco_lab.errors import UserError
from lyco_lab.formats import kohya

MODULE = '''
from dataclasses import dataclass
from lyco_lab.adapters.lora import LoRA
from lyco_lab.optimizers.sgd import SGD

@dataclass(frozen=True)
class Halved(LoRA):
    """A LoRA whose components have a settable share."""
    share: float = 0.5

@dataclass(frozen=True)
class Slow(SGD):
    patience: int = 3

class Bare(LoRA):
    pass

class Other:
    pass
'''


NUMBERS = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the folder the command is run in; of another name in each test."""
    name = f"of_a_user_{next(NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    families = (adapters.FAMILY, optimizers.FAMILY)
    before = [dict(family.kinds) for family in families]
    yield name
    for family, kinds in zip(families, before, strict=True):
        family.kinds.clear()
        family.kinds.update(kinds)


@pytest.fixture
def study(tmp_path):
    def load(text, overrides=()):
        folder = tmp_path / "study"
        folder.mkdir(exist_ok=True)
        head = "question: Q?\nexpectation: E.\n"
        (folder / "study.yaml").write_text(head + textwrap.dedent(text))
        return load_study(folder, overrides)

    return load


def test_a_study_names_them_and_gives_their_settings(module, study):
    found = study(
        f"""
        set: {{data.concept: kael, adapter: {{kind: {module}.Halved, rank: 2}}}}
        grid: {{adapter.share: [0.25, 0.75]}}
        runs:
          - {{name: fast, set: {{train.lr: 1e-2}}}}
          - name: slow
            set: {{optimizer: {{kind: {module}.Slow, patience: 7}}}}
        """
    )
    assert sorted(run.adapter_value().share for run in found.runs) == [0.25, 0.25, 0.75, 0.75]
    assert {run.adapter["kind"] for run in found.runs} == {f"{module}.Halved"}
    slow = next(run for run in found.runs if "slow" in run.name)
    assert (slow.optimizer_value().patience, type(slow.optimizer_value()).__name__) == (7, "Slow")
    assert adapters.describe(slow.adapter_value()) == slow.adapter
    (other,) = study(
        "set: {data.concept: kael}", [f"adapter.kind={module}.Halved", "adapter.share=0.5"]
    ).runs
    assert other.adapter_value().share == 0.5 and other.hash not in {r.hash for r in found.runs}


def test_a_kind_of_the_library_has_one_word(study):
    (long,) = study("set: {data.concept: kael}", ["adapter.kind=lyco_lab.adapters.loha.LoHa"]).runs
    (short,) = study("set: {data.concept: kael}", ["adapter.kind=loha"]).runs
    assert long.adapter == short.adapter and long.hash == short.hash


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("MODULE.Halvd", "has no Halvd (did you mean 'Halved'?)"),
        ("MODULE.Bare", "needs @dataclass(frozen=True)"),
        ("MODULE.Other", "is no lyco_lab.adapters.base.Adapter"),
        ("nowhere_at_all.Halved", "there is no module 'nowhere_at_all'"),
        ("lyco_lab.adapters.base.Adapter", "has no "),
    ],
)
def test_what_is_no_kind_is_said(module, study, kind, said):
    kind = kind.replace("MODULE", module)
    with pytest.raises(UserError, match="adapter.kind is") as error:
        study(f"set: {{data.concept: kael, adapter.kind: {kind}}}")
    assert said in str(error.value) and "study.yaml" in str(error.value)
    with pytest.raises(UserError, match="unknown key 'adapter.share'"):
        study("set: {data.concept: kael, adapter.share: 0.5}")


def test_a_file_imports_nothing(module, tmp_path, monkeypatch):
    halved = adapters.FAMILY.learn(f"{module}.Halved")
    model = nn.Sequential(nn.Linear(4, 6))
    mounted = attach(model, halved(rank=2, share=0.25), ["0"], seed=0)
    path = tmp_path / "adapter.safetensors"
    kohya.save(path, {"unet": mounted}, {})
    (again,) = kohya.apply(path, {"unet": nn.Sequential(nn.Linear(4, 6))}).values()
    assert again.adapter == mounted.adapter
    assert all(torch.equal(v, mounted.state_dict()[k]) for k, v in again.state_dict().items())
    monkeypatch.delitem(sys.modules, module)
    adapters.FAMILY.kinds.pop(f"{module}.Halved")
    with pytest.raises(UserError, match=f"import {module} first, if you trust it"):
        kohya.apply(path, {"unet": nn.Sequential(nn.Linear(4, 6))})
    assert module not in sys.modules
    importlib.import_module(module)
    kohya.apply(path, {"unet": nn.Sequential(nn.Linear(4, 6))})
