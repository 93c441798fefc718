"""Findings: computed, cautious about ties, silent where nothing is known."""

import math

import pandas as pd
import pytest

from lyco_lab.analyse.gamma_pair import compare
from lyco_lab.analyse.table import quoted
from lyco_lab.report.findings import by_label, caveat, findings


def results(**columns: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """One concept; each column maps adapters to (mean, standard error)."""
    rows = []
    for adapter in ("base", "lora", "loha", "lokr", "real"):
        row: dict[str, object] = {
            "run": adapter, "label": adapter, "concept": "kael", "adapter": adapter,
        }  # fmt: skip
        for column in quoted():
            mean, error = columns.get(column, {}).get(adapter, (math.nan, math.nan))
            row |= {column: mean, f"{column}_se": error}
        rows.append(row)
    return pd.DataFrame(rows)


def text_of(title: str, frame: pd.DataFrame) -> str:
    return next(f.text for f in findings(frame, []) if f.title == title)


def test_a_clear_lead_is_called_one():
    frame = results(
        image_similarity_alter={
            "base": (0.1, 0.01), "lora": (0.3, 0.01), "loha": (0.5, 0.01), "lokr": (0.2, 0.01),
        }
    )  # fmt: skip
    said = text_of("Fidelity", frame)
    assert "loha at 0.50, ahead of all others" in said
    assert "worst is lokr at 0.20" in said
    assert "base model has 0.10" in said


def test_a_lead_within_two_standard_errors_is_called_a_tie():
    frame = results(
        image_similarity_alter={"lora": (0.48, 0.05), "loha": (0.5, 0.05), "lokr": (0.2, 0.01)}
    )
    assert "loha at 0.50, not clearly ahead of lora; worst is lokr" in text_of("Fidelity", frame)


def test_where_nothing_is_clear_nothing_is_claimed():
    frame = results(
        image_similarity_alter={"lora": (0.48, 0.2), "loha": (0.5, 0.2), "lokr": (0.4, 0.2)}
    )
    assert "no configuration is clear of it" in text_of("Fidelity", frame)


def test_lower_is_better_where_the_metric_says_so():
    frame = results(style_loss={"lora": (0.4, 0.01), "loha": (0.1, 0.01), "lokr": (0.9, 0.01)})
    assert "loha at 0.10" in text_of("Preservation", frame)


def test_what_was_learnt_names_the_best_and_what_it_was_before():
    frame = results(
        concept_accuracy_trigger={
            "base": (0.0, 0.0), "lora": (0.9, 0.1), "loha": (0.9, 0.1), "lokr": (0.5, 0.1),
        }
    )  # fmt: skip
    assert "kael 0.90 with lora and loha (before training 0.00)" in text_of("Was it learnt?", frame)


@pytest.mark.parametrize(
    ("texts", "word"), [((0.3, 0.2, 0.1), "against each other"), ((0.1, 0.2, 0.3), "together")]
)
def test_the_trade_off_is_a_rank_correlation(texts, word):
    runs = ("lora", "loha", "lokr")
    frame = results(
        image_similarity_alter={run: (x, 0.01) for run, x in zip(runs, (1, 2, 3), strict=True)},
        text_similarity_alter={run: (x, 0.01) for run, x in zip(runs, texts, strict=True)},
    )
    assert word in text_of("Fidelity against control", frame)


def test_labels_missing_for_a_concept_are_not_averaged_with_the_others():
    one = results(image_similarity_alter={"lora": (0.4, 0.03), "loha": (0.9, 0.0)})
    two = results(image_similarity_alter={"lora": (0.2, 0.04)}).assign(concept="octo")
    means = by_label(pd.concat([one, two]), "image_similarity_alter")
    assert list(means.index) == ["lora"]
    assert means.loc["lora", "mean"] == pytest.approx(0.3)
    assert means.loc["lora", "se"] == pytest.approx(0.025)


def test_an_empty_table_has_no_findings_and_verdicts_are_repeated():
    assert findings(results(), []) == []
    verdicts = [compare("a", "b", {1: 0.5}, {1: 0.5}), compare("a", "c", {1: 0.5}, {1: 0.25})]
    titles = [f.title for f in findings(results(), verdicts)]
    assert titles == ["γ equivalence holds", "γ equivalence fails"]


def test_one_seed_is_owned_up_to():
    assert "One seed" in caveat(1)
    assert "3 seeds" in caveat(3)
