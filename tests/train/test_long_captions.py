"""Runs that read more of a caption than a window see it, in training and in their images."""

import dataclasses
import shutil

import pytest
import torch

from lyco_lab.config import Data, Generate
from lyco_lab.data.stage import prepare
from lyco_lab.generate import generate
from lyco_lab.record import Record
from lyco_lab.train import train
from tests.train.test_stage import factors, rows

WINDOW = "sks circle, abcdefghijklmnopqrst, "  # 31 tokens


@pytest.fixture
def of_captions(begin, tiny_concept, tmp_path):
    """of_captions("a", "said at the end", max_token_length=60) -> a run that was trained."""

    def of_captions(where, ending, data=None, **settings):
        folder = shutil.copytree(tiny_concept, tmp_path / f"{where}-images")
        (folder / "manifest.jsonl").unlink()
        for file in folder.glob("*.txt"):
            file.write_text(WINDOW + ending)
        run, _ = begin(where, **({"steps": 3, "lr": 1e-2} | settings))
        run = dataclasses.replace(
            run,
            data=Data(folder=str(folder), **data or {}),
            generate=Generate(types=("train",), images_per_type=1, steps=2),
        )
        record = Record.open(tmp_path / where, run)
        prepare(run, record)
        train(run, record)
        return run, record

    return of_captions


def losses(made):
    return [row["loss"] for row in rows(made[1])]


@pytest.mark.parametrize("text_encoder", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_behind_the_window_is_seen_only_where_it_is_read(of_captions, capsys, text_encoder):
    def made(name, ending, tokens):
        return of_captions(name, ending, text_encoder=text_encoder, max_token_length=tokens)

    cut = made("cut", "red", None)
    assert "6 of 6 captions are longer than" in capsys.readouterr().out
    assert losses(made("cut-too", "blue", None)) == losses(cut)
    one = made("one", "red", 30)
    assert losses(one) == losses(cut)
    assert all(torch.equal(factors(one[1])[name], f) for name, f in factors(cut[1]).items())
    capsys.readouterr()
    red, blue = made("red", "red", 60), made("blue", "blue", 60)
    assert "captions" not in capsys.readouterr().out
    assert len({tuple(losses(run)) for run in (cut, red, blue)}) == 3


@pytest.mark.parametrize("data", [{}, {"shuffle_tags": True, "tag_dropout": 0.3}], ids=str)
def test_a_step_in_parts_is_the_step(of_captions, data):
    how = {"max_token_length": 60, "text_encoder": True, "caption_dropout": 0.3}
    whole = of_captions("whole", "red, big", data, batch_size=4, **how)
    parts = of_captions("parts", "red, big", data, batch_size=2, accumulate=2, **how)
    for key in ("loss", "grad_norm"):
        found, expected = ([float(row[key]) for row in rows(made[1])] for made in (parts, whole))
        assert found == pytest.approx(expected, rel=1e-3)


def test_images_of_a_run_are_asked_for_at_its_length(of_captions, monkeypatch):
    from diffusers import StableDiffusionPipeline

    seen = []
    call = StableDiffusionPipeline.__call__

    def looking(self, *given, **more):
        seen.append((more["prompt_embeds"].shape[1], more["negative_prompt_embeds"].shape[1]))
        return call(self, *given, **more)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", looking)
    run, record = of_captions("run", "red", max_token_length=90, sample_every=3)
    assert seen == [(92, 92)]
    generate(run, record)
    assert seen == [(92, 92)] * 3  # of the base model, and of the run
