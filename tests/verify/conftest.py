"""The command, on the tiny model, and cases without a command."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lyco_lab import cli
from lyco_lab.verify import case, work


@pytest.fixture
def place(tiny_sd, tiny_concept) -> list[str]:
    """Settings that train the tiny model for a few steps."""
    return [f"model.path={tiny_sd}", f"data.folder={tiny_concept}", "train.steps=6"]


@pytest.fixture
def verify(monkeypatch, tmp_path, place):
    """Run the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        words = ["verify", *map(str, words), *place]
        monkeypatch.setattr(sys, "argv", ["lyco-lab", *words])
        return CliRunner().invoke(cli.app, words)

    return call


@pytest.fixture
def cases(place):
    """cases("lora", "adamw", 2**-12, ...) -> what such a command would try."""

    def cases(adapters="lora", optimizers="adamw", gamma=2.0**-12, dtype="fp32", **how):
        settings = [*place, *how.pop("settings", [])]
        words = [text.split(",") for text in (adapters, optimizers)]
        return case.cases(*words, [gamma], dtype.split(","), settings=settings, **how)

    return cases


@pytest.fixture
def rows():
    """The cases, tried."""

    def rows(cases):
        found = dict(work.verify(cases, workers=1))
        return [found[place] for place in range(len(cases))]

    return rows


@pytest.fixture
def empty(tmp_path):
    """Whether nothing was written where the command ran."""
    return lambda: not list(Path(tmp_path).iterdir())
