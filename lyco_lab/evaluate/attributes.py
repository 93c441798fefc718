"""Does the image show what was asked for? An oracle reads attributes off the image and says.

    attribute accuracy of an image = share of the families its prompt speaks of (hair colour,
                                     background, ...) in which the oracle's reading agrees
    concept accuracy of an image   = 1 if the oracle recognises the trained concept, else 0

Both are averaged over images; range [0, 1], higher is better. Families that a prompt leaves open
are ignored, so a free choice is never an error; an image whose prompt states nothing has no
attribute accuracy. The concept is its own metric and never counts among the attributes: a model
that draws the concept everywhere and ignores the rest must not gain by it. The paper has no
counterpart (its images have no ground truth); the ceiling is the oracle's score on real images.
"""

from typing import ClassVar, Literal

import numpy as np

from lyco_lab.evaluate.base import Encoded, Metric, Score, View, per_image

CONCEPT_FAMILY = "concept"


def agreement(
    readings: dict[str, list[str]], asked: list[dict[str, str]]
) -> dict[str, list[float]]:
    """Per family, per image: 1 where reading and request agree, 0 where not, NaN if not asked."""
    return {
        family: [
            float(found == want[family]) if family in want else float("nan")
            for found, want in zip(values, asked, strict=True)
        ]
        for family, values in readings.items()
    }


def _check(images: Encoded, asked: list[dict[str, str]]) -> None:
    """A family or value the oracle has no word for would count as a miss for ever: refuse it."""
    known = images.judges.vocabulary
    for family, value in sorted({pair for want in asked for pair in want.items()}):
        if family not in known:
            raise ValueError(
                f"a prompt asks for {family}={value!r}, a family that the oracle does not read; "
                f"it reads {', '.join(known)}"
            )
        if value not in known[family]:
            raise ValueError(
                f"a prompt asks for {family}={value!r}, but the oracle's values of {family} are "
                f"{', '.join(known[family])}"
            )


class AttributeAccuracy(Metric):
    name: ClassVar[str] = "attribute_accuracy"
    title: ClassVar[str] = "Attribute accuracy"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    columns: ClassVar[dict[str, str]] = {"attribute_accuracy_alter": "alter"}

    def measure(self, view: View) -> dict[str, Score]:
        asked = [
            {family: value for family, value in want.items() if family != CONCEPT_FAMILY}
            for want in view.attributes
        ]
        _check(view.images, asked)
        hits = {
            family: values
            for family, values in agreement(view.images.readings, asked).items()
            if not np.isnan(values).all()
        }
        if not hits:
            return {}
        table = np.array(list(hits.values()))
        count = np.isfinite(table).sum(axis=0)
        mean = np.where(count > 0, np.nansum(table, axis=0) / np.maximum(count, 1), np.nan)
        parts = {f"{self.name}/{family}": per_image(hits[family], view) for family in sorted(hits)}
        return {self.name: per_image(mean, view), **parts}


class ConceptAccuracy(Metric):
    name: ClassVar[str] = "concept_accuracy"
    title: ClassVar[str] = "Concept accuracy"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    columns: ClassVar[dict[str, str]] = {"concept_accuracy_trigger": "trigger"}

    def measure(self, view: View) -> dict[str, Score]:
        asked = [{CONCEPT_FAMILY: concept} if concept else {} for concept in view.concepts]
        if not any(asked):
            return {}
        _check(view.images, asked)
        hits = agreement(view.images.readings, asked)[CONCEPT_FAMILY]
        return {self.name: per_image(hits, view)}
