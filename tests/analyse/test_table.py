"""A study's table: which rows it has, what stands in them, and that the file says the same."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from lyco_lab.analyse import analyse, verdicts
from lyco_lab.analyse.table import FIRST, quoted, table
from lyco_lab.errors import UserError
from lyco_lab.evaluate import METRICS
from lyco_lab.record import Record


@pytest.fixture(scope="module")
def frame(evaluated):
    return table(*evaluated)


def test_each_concept_has_its_references_around_its_runs(evaluated, frame):
    study, _ = evaluated
    assert frame["concept"].unique().tolist() == ["kael", "neon"]
    for concept, rows in frame.groupby("concept"):
        runs = [run.name for run in study.runs if run.data.concept == concept]
        assert rows["run"].tolist() == ["base", *runs, "real"]
        assert rows["adapter"].tolist()[0] == "base" and rows["adapter"].tolist()[-1] == "real"
    assert frame.groupby("concept")["category"].first().to_dict() == {
        "kael": "anime",
        "neon": "style",
    }


def test_the_columns_are_the_usual_ones_each_with_its_standard_error(frame):
    assert tuple(quoted()) == FIRST
    for column in FIRST:
        position = list(frame.columns).index(column)
        assert frame.columns[position + 1] == f"{column}_se"
    assert list(frame.columns[-2:]) == ["trainable_params", "train_seconds"]


def test_every_value_is_the_one_in_the_runs_own_file(evaluated, frame):
    study, root = evaluated
    for run in study.runs:
        path = Record(root / run.folder_name).path / "evaluate" / "metrics.json"
        scores = json.loads(path.read_text())
        row = frame.set_index("run").loc[run.name]
        for column, (metric, kind) in quoted().items():
            if metric.name in scores.get(kind, {}):
                assert row[column] == scores[kind][metric.name]["mean"]
            else:
                assert np.isnan(row[column])


def test_values_lie_in_the_ranges_their_metrics_claim(frame):
    for column, (metric, _) in quoted().items():
        assert frame[column].dropna().between(metric.low, metric.high).all()


def test_a_style_has_no_style_prompts_and_real_images_no_partner(frame):
    assert frame.loc[frame["concept"] == "neon", "style_loss"].isna().all()
    assert frame.loc[frame["adapter"] == "real", "style_loss"].isna().all()
    assert frame.set_index(["run", "concept"]).loc[("base", "kael"), "style_loss"] == 0


def test_the_file_says_what_the_table_says(evaluated, frame):
    study, root = evaluated
    again = pd.read_csv(root / study.name / "results.csv")
    pd.testing.assert_frame_equal(again, frame, check_exact=True)


def test_a_run_that_is_not_evaluated_is_named(evaluated, tmp_path):
    study, _ = evaluated
    with pytest.raises(UserError, match=f"{study.runs[0].name}.*not evaluated"):
        table(study, tmp_path)
    mark = tmp_path / study.runs[0].folder_name / "done" / "evaluate.json"
    mark.parent.mkdir(parents=True)
    mark.write_bytes(b"")
    with pytest.raises(UserError, match="evaluate.json is damaged.*run the study again"):
        table(study, tmp_path)


def test_the_pairs_of_a_study_are_compared_and_written(evaluated):
    study, root = evaluated
    _, found = analyse(study, root)
    assert [v.equal for v in found] == [True]
    assert found[0].steps == 120
    rows = pd.read_csv(root / study.name / "gamma.csv")
    assert len(rows) == 120
    assert (rows["loss_gamma"] == rows["loss_rewritten"]).all()
    assert rows["loss_gamma"].str.startswith("0x").all()


def test_two_different_runs_are_told_apart(evaluated):
    study, root = evaluated
    unequal = dataclasses.replace(study, pairs=(("lora-kael", "loha-kael"),))
    assert not verdicts(unequal, root)[0].equal


def test_metrics_name_their_columns_once():
    columns = [column for metric in METRICS.values() for column in metric.columns]
    assert len(columns) == len(set(columns))
