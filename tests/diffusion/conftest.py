"""Tiny models of every family, made once."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from lyco_lab.config import Model
from lyco_lab.diffusion.sources import single_file
from tests.conftest import tiny_tokenizer
from tests.diffusion import original, tiny

LAYOUTS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory):
    """tiny_of("sdxl") -> a diffusers folder; settings beyond that go to its scheduler."""

    @functools.cache
    def tiny_of(family: str, **settings) -> Path:
        folder = tmp_path_factory.mktemp(family)
        return tiny.save(family, folder, tiny_tokenizer(), **settings)

    return tiny_of


@pytest.fixture
def tiny_configs(tiny_of, tmp_path, monkeypatch):
    """The configurations for single files are those of the tiny models."""
    for family, layout in LAYOUTS.items():
        folder = tiny_of(family)
        for file in folder.rglob("*config.json"):
            if not file.parent.name.startswith("tokenizer"):
                copy = tmp_path / "configs" / layout / file.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
    schedule = tmp_path / "configs" / "sd21" / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"prediction_type": None}))
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")


@pytest.fixture(scope="session")
def model_of(tiny_of, tmp_path_factory):
    """model_of("sdxl", "ckpt") -> what a study says of the same weights in that layout."""

    @functools.cache
    def model_of(family: str, layout: str) -> Model:
        folder = tiny_of(family)
        if layout == "folder":
            return Model(path=str(folder))
        file = tmp_path_factory.mktemp(layout) / f"{family}.{layout}"
        save = original.save_ckpt if layout == "ckpt" else original.save_safetensors
        save(original.tensors(folder), file)
        predicts = "v_prediction" if family == "sd2" else None
        return Model(path=str(file), tokenizer=str(folder / "tokenizer"), prediction=predicts)

    return model_of
