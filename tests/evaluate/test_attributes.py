"""Attribute and concept accuracy: who is asked, who is ignored, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.evaluate.attributes import AttributeAccuracy, ConceptAccuracy, agreement
from tests.evaluate.fakes import HUES, LIGHTS
from tests.evaluate.views import view_of

BRIGHT_RED, DARK_BLUE, WHITE = (255, 140, 140), (0, 0, 100), (255, 255, 255)

wishes = st.fixed_dictionaries(
    {}, optional={"hue": st.sampled_from(HUES), "light": st.sampled_from(LIGHTS)}
)
cases = st.lists(
    st.tuples(st.sampled_from(HUES), st.sampled_from(LIGHTS), wishes), min_size=1, max_size=6
)


def plain(*colours: tuple[int, int, int]) -> np.ndarray:
    """One image of one colour each."""
    return np.array(colours, np.uint8)[:, None, None, :].repeat(8, axis=1).repeat(8, axis=2)


@given(cases=cases)
def test_agreement_matches_the_definition(cases):
    readings = {"hue": [c[0] for c in cases], "light": [c[1] for c in cases]}
    asked = [c[2] for c in cases]
    found = agreement(readings, asked)
    for family in ("hue", "light"):
        for i, want in enumerate(asked):
            if family not in want:
                assert math.isnan(found[family][i])
            else:
                assert found[family][i] == (1.0 if readings[family][i] == want[family] else 0.0)


def test_an_image_scores_the_share_of_the_families_it_was_asked_for():
    view = view_of(
        plain(BRIGHT_RED, DARK_BLUE, DARK_BLUE),
        attributes=[{"hue": "red", "light": "dark"}, {"hue": "blue"}, {}],
        prompts=["a", "b", "c"],
    )
    scores = AttributeAccuracy().measure(view)
    assert scores["attribute_accuracy"].values[:2] == (0.5, 1.0)
    assert math.isnan(scores["attribute_accuracy"].values[2])
    assert scores["attribute_accuracy"].mean == 0.75
    assert scores["attribute_accuracy/hue"].mean == 1.0
    assert scores["attribute_accuracy/light"].mean == 0.0


def test_the_concept_is_not_an_attribute():
    """A prompt may name the concept among its attributes; drawing it must not buy accuracy."""
    view = view_of(plain(DARK_BLUE), attributes=[{"hue": "red", "concept": "none"}])
    scores = AttributeAccuracy().measure(view)
    assert scores["attribute_accuracy"].values == (0.0,)
    assert set(scores) == {"attribute_accuracy", "attribute_accuracy/hue"}


def test_concept_accuracy_is_the_share_of_images_where_it_is_seen():
    view = view_of(plain(WHITE, DARK_BLUE, WHITE), concepts=["vokael", "vokael", ""])
    score = ConceptAccuracy().measure(view)["concept_accuracy"]
    assert score.values[:2] == (1.0, 0.0)
    assert math.isnan(score.values[2])
    assert score.mean == 0.5


def test_nothing_asked_means_no_score():
    view = view_of(plain(WHITE), attributes=[{}], concepts=[""])
    assert AttributeAccuracy().measure(view) == {}
    assert ConceptAccuracy().measure(view) == {}


@pytest.mark.parametrize(
    ("want", "message"),
    [({"wheels": "four"}, "wheels='four'.*does not read"), ({"hue": "mauve"}, "hue='mauve'.*red")],
)
def test_what_the_oracle_has_no_word_for_is_refused(want, message):
    with pytest.raises(ValueError, match=message):
        AttributeAccuracy().measure(view_of(plain(WHITE), attributes=[want]))


def test_a_concept_the_oracle_has_no_word_for_is_refused():
    with pytest.raises(ValueError, match="concept='nobody'"):
        ConceptAccuracy().measure(view_of(plain(WHITE), concepts=["nobody"]))
