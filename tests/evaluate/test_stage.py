"""From images to numbers: the per-image table, its aggregates, and the references beside them."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lyco_lab.errors import UserError
from lyco_lab.evaluate import METRICS
from lyco_lab.evaluate.base import Score
from lyco_lab.evaluate.stage import check_pairs, known, read_images, summary
from lyco_lab.generate import base_folder, read_table
from lyco_lab.record import Record
from tests.evaluate.fakes import FakeJudges

KINDS = ["train", "trigger", "alter", "style"]


@pytest.fixture
def kael(evaluated):
    study, root = evaluated
    run = study.run("loha-kael")
    return run, Record(root / run.folder_name)


def metrics_of(record: Record) -> dict:
    return json.loads((record.path / "evaluate" / "metrics.json").read_text())


def test_every_image_has_a_row_and_a_file(kael):
    _, record = kael
    table = pd.read_parquet(record.path / "evaluate" / "images.parquet")
    assert table.groupby("kind").size().to_dict() == dict.fromkeys(KINDS, 4)
    assert all((record.path / file).is_file() for file in table["file"])
    assert table["seed"].tolist() == [1000, 1001, 1002, 1003] * 4


def test_aggregates_are_the_means_of_the_rows(kael):
    _, record = kael
    table = pd.read_parquet(record.path / "evaluate" / "images.parquet")
    checked = 0
    for kind, scores in metrics_of(record).items():
        rows = table[table["kind"] == kind]
        for name, score in scores.items():
            if score["unit"] != "image":
                continue
            values = rows[name].dropna()
            np.testing.assert_allclose(score["mean"], values.mean())
            assert score["n"] == len(values)
            checked += 1
    assert checked >= len(KINDS) * 4


def test_all_metrics_are_measured_on_the_types_they_are_quoted_on(kael):
    _, record = kael
    scores = metrics_of(record)
    for metric in METRICS.values():
        for kind in metric.columns.values():
            assert scores[kind][metric.name]["mean"] is not None


def test_references_are_the_base_model_and_the_training_images(kael):
    run, record = kael
    path = base_folder(run, record) / "references-drop.json"
    references = json.loads(path.read_text())
    assert set(references) == {"base", "real"}
    assert references["base"]["style"]["style_loss"]["mean"] == 0
    assert references["base"]["trigger"]["concept_accuracy"]["mean"] == 0
    assert references["real"]["real"]["concept_accuracy"]["mean"] == 1
    assert "style_loss" not in references["real"]["real"]


def test_runs_of_a_concept_share_the_base_models_images_and_concepts_do_not(evaluated):
    study, root = evaluated
    folders = {
        run.data.concept: {
            base_folder(r, Record(root / r.folder_name))
            for r in study.runs
            if r.data.concept == run.data.concept
        }
        for run in study.runs
    }
    assert [len(found) for found in folders.values()] == [1, 1]
    assert len(set.union(*folders.values())) == 2


def test_what_does_not_apply_is_null_and_no_nan_reaches_the_file(kael):
    score = Score((math.nan, math.nan), ("a", "b"), "image")
    found = summary({"alter": {"x": score}})["alter"]["x"]
    assert found == {"mean": None, "standard_error": None, "n": 0, "unit": "image"}
    text = (kael[1].path / "evaluate" / "metrics.json").read_text()
    assert "NaN" not in text


def test_a_done_stage_is_not_done_again(kael):
    from lyco_lab.evaluate.stage import evaluate

    run, record = kael
    before = (record.path / "evaluate" / "metrics.json").stat().st_mtime_ns
    evaluate(run, record)
    assert (record.path / "evaluate" / "metrics.json").stat().st_mtime_ns == before


def test_images_of_other_prompts_or_seeds_are_not_compared(kael):
    run, record = kael
    made = read_table(record.path / "generate")
    other = made.assign(seed=made["seed"] + 1)
    with pytest.raises(UserError, match="same prompts and seeds"):
        check_pairs(made, other, record.path, base_folder(run, record))


def test_a_half_written_image_is_named(tmp_path, kael):
    source = kael[1].path / "generate" / "alter" / "0000.png"
    shutil.copy(source, tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes(source.read_bytes()[:400])
    assert read_images([str(tmp_path / "whole.png")]).shape == (1, 64, 64, 3)
    with pytest.raises(UserError, match="half.png"):
        read_images([str(tmp_path / "half.png")])


def test_images_are_read_as_they_were_written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_images([str(tmp_path / "x.png")])[0], pixels)


def test_a_folders_own_labels_are_asked_only_where_the_oracle_knows_them():
    labels = {"hue": "red", "light": "dim", "wheels": "four"}
    assert known(labels, FakeJudges()) == {"hue": "red"}
