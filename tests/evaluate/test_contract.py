"""What must hold for every metric. A new file in lyco_lab/evaluate/ is tested here for free."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.evaluate import METRICS
from lyco_lab.evaluate.base import Encoded, View
from tests.evaluate.views import JUDGES, random_view, view_of
from tests.strategies import seeds

every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
kinds = st.sampled_from(["train", "trigger", "alter", "style"])
sizes = st.integers(min_value=1, max_value=9)


def reordered(view: View, order: list[int]) -> View:
    def pick(items):
        return [items[i] for i in order]

    return View(
        view.kind,
        Encoded(view.images.images[order], JUDGES),
        view.real,
        Encoded(view.base.images[order], JUDGES),
        pick(view.texts),
        pick(view.prompts),
        pick(view.attributes),
        pick(view.concepts),
    )


def test_the_papers_metrics_are_found():
    assert set(METRICS) >= {
        "image_similarity",
        "text_similarity",
        "vendi",
        "style_loss",
        "attribute_accuracy",
        "concept_accuracy",
    }


@every_metric
@given(n=sizes, m=sizes, seed=seeds, kind=kinds)
def test_values_lie_in_the_claimed_range_and_names_are_its_own(metric, n, m, seed, kind):
    scores = metric.measure(random_view(n, m, seed, kind))
    assert all(name.split("/")[0] == metric.name for name in scores)
    assert not scores or metric.name in scores
    for score in scores.values():
        assert len(score.values) == len(score.groups)
        assert score.unit != "image" or len(score.values) == n
        assert all(metric.low <= v <= metric.high for v in score.values if not math.isnan(v))


@every_metric
@given(n=sizes, seed=seeds, kind=kinds, data=st.data())
def test_the_order_of_images_changes_no_mean_and_no_standard_error(metric, n, seed, kind, data):
    view = random_view(n, 4, seed, kind)
    order = data.draw(st.permutations(range(n)))
    straight, shuffled = metric.measure(view), metric.measure(reordered(view, order))
    assert straight.keys() == shuffled.keys()
    for name, score in straight.items():
        np.testing.assert_allclose(shuffled[name].mean, score.mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            shuffled[name].standard_error, score.standard_error, rtol=1e-6, atol=1e-9
        )
        if score.unit == "image":
            np.testing.assert_allclose(
                shuffled[name].values, np.array(score.values)[order], rtol=1e-9, atol=1e-12
            )


@every_metric
def test_the_training_images_themselves_can_be_looked_at(metric):
    """The reference row "real": the same images in both places, and no base model's partner."""
    images = random_view(5, 1, 0, "train").images.images
    for score in metric.measure(view_of(images, kind="real")).values():
        assert score.n > 0


@pytest.mark.parametrize("name", ["texts", "prompts", "attributes", "concepts"])
def test_a_view_with_too_few_of_anything_is_refused(name):
    view = random_view(3, 1, 0, "train")
    with pytest.raises(ValueError, match=f"3 images needs as many {name}, got 2"):
        dataclasses.replace(view, **{name: getattr(view, name)[:2]})


def test_a_view_needs_one_partner_per_image():
    images = random_view(3, 1, 0, "train").images.images
    with pytest.raises(ValueError, match="3 images cannot be paired with 2"):
        view_of(images, real=images, base=images[:2])


@pytest.mark.parametrize(
    "images", [np.zeros((0, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.float32)]
)
def test_only_uint8_images_and_at_least_one_are_encoded(images):
    with pytest.raises(ValueError, match="uint8"):
        Encoded(images, JUDGES)
