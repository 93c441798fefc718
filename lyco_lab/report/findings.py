"""What the table says, in sentences: every number is computed, and ties are called ties.

A lead counts when it exceeds twice the standard error of the difference, sqrt(a^2 + b^2) of the
two means'. Standard errors are over prompts (and concepts), so they say nothing about another
seed; with a single seed the page says so.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from lyco_lab.analyse.gamma_pair import Verdict
from lyco_lab.analyse.table import BASE, quoted
from lyco_lab.evaluate.stage import REAL


@dataclass(frozen=True)
class Finding:
    title: str
    text: str


def findings(results: pd.DataFrame, verdicts: list[Verdict]) -> list[Finding]:
    """The page's summary; `results` has a column `label`, a run's name without its concept."""
    found = [*_learnt(results), *_leader(results, "image_similarity_alter", "Fidelity")]
    found += _leader(results, "text_similarity_alter", "Control")
    found += [*_trade_off(results), *_leader(results, "style_loss", "Preservation")]
    for verdict in verdicts:
        title = "γ equivalence holds" if verdict.equal else "γ equivalence fails"
        found.append(Finding(title, verdict.sentence))
    return found


def caveat(seeds: int, *, several: bool = False) -> str:
    """What the findings cannot say. `several`: concepts in one folder."""
    what = "concepts, where a folder holds several, or prompts" if several else "prompts"
    if seeds > 1:
        return f"{seeds} seeds per configuration; standard errors are over {what}."
    return (
        f"One seed per configuration. Standard errors are over {what}: how much another seed "
        "would change is not known here."
    )


def runs_of(results: pd.DataFrame) -> pd.DataFrame:
    return results[~results["adapter"].isin([BASE, REAL])]


def _learnt(results: pd.DataFrame) -> Iterator[Finding]:
    column = "concept_accuracy_trigger"
    said = []
    for concept, rows in results.groupby("concept", sort=False):
        runs = runs_of(rows).dropna(subset=[column])
        before = rows.loc[rows["adapter"] == BASE, column]
        if runs.empty or before.isna().all():
            continue
        top = runs[column].max()
        names = runs.loc[runs[column] == top, "label"].tolist()
        said.append(
            f"{concept} {top:.2f} with {_list(names)} (before training {before.iloc[0]:.2f})"
        )
    if said:
        yield Finding(
            "Was it learnt?",
            "Share of trigger images in which the oracle sees the concept, for the best run: "
            f"{_list(said)}.",
        )


def _leader(results: pd.DataFrame, column: str, title: str) -> Iterator[Finding]:
    """Which configuration is best in a column, averaged over the concepts that all have."""
    means = by_label(results, column)
    if len(means) < 2 or column not in quoted():
        return
    metric, kind = quoted()[column]
    means = means.sort_values("mean", ascending=metric.better == "lower")
    best = means.iloc[0]
    tied = [row.Index for row in means.iloc[1:].itertuples() if not leads(best, row)]
    what = f"{metric.title} on {kind} prompts"
    text = f"{what} ({metric.better} is better): {best.name} at {_said(best['mean'])}"
    worst = means.iloc[-1]
    if len(tied) == len(means) - 1:
        text += f", but no configuration is clear of it: the worst is {worst.name}"
    elif tied:
        text += f", not clearly ahead of {_list(tied)}; worst is {worst.name}"
    else:
        text += f", ahead of all others by more than two standard errors; worst is {worst.name}"
    text += f" at {_said(worst['mean'])}."
    before = results.loc[results["adapter"] == BASE, column].dropna()
    if metric.name != "style_loss" and len(before):
        text += f" The base model has {_said(before.mean())}."
    yield Finding(title, text)


def leads(best: pd.Series, other: object) -> bool:
    """More than two standard errors of the difference apart; unknown errors count as zero."""
    errors = [e for e in (best["se"], getattr(other, "se", 0.0)) if math.isfinite(e)]
    gap = abs(best["mean"] - getattr(other, "mean", math.nan))
    return bool(gap > 2 * math.hypot(*errors)) if errors else bool(gap > 0)


def by_label(results: pd.DataFrame, column: str) -> pd.DataFrame:
    """label -> mean over concepts and its standard error, of labels present for every concept."""
    if column not in results:
        return pd.DataFrame(columns=["mean", "se"])
    runs = runs_of(results).dropna(subset=[column])
    complete = runs.groupby("label")["concept"].nunique()
    full = complete[complete == complete.max()].index
    rows = {}
    for label in full:
        mine = runs[runs["label"] == label]
        errors = mine[f"{column}_se"].fillna(0.0)
        rows[label] = {
            "mean": mine[column].mean(),
            "se": math.sqrt(float((errors**2).sum())) / len(mine),
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "se"])


def _trade_off(results: pd.DataFrame) -> Iterator[Finding]:
    """Do runs that look more like the concept obey less? Ranks within each concept."""
    pair = ["image_similarity_alter", "text_similarity_alter"]
    runs = runs_of(results)
    if any(column not in runs for column in pair):
        return
    ranks = []
    for _, rows in runs.dropna(subset=pair).groupby("concept", sort=False):
        if len(rows) > 2:
            ranks.append(rows[pair].rank() - rows[pair].rank().mean())
    if not ranks:
        return
    both = pd.concat(ranks)
    spread = both.std()
    if (spread == 0).any():
        return
    rho = float(both[pair[0]].corr(both[pair[1]]))
    word = "against each other" if rho < -0.3 else "together" if rho > 0.3 else "independently"
    yield Finding(
        "Fidelity against control",
        f"Over {len(both)} runs, ranked within their concept, image and text similarity on alter "
        f"prompts move {word} (rank correlation {rho:.2f}).".replace("-", "−"),
    )


def _said(value: float) -> str:
    """Two digits after the point, or two digits at all, and a minus sign that is one."""
    text = f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"
    return text.replace("-", "−")


def _list(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
