"""Scenes and their captions: what is said is what is shown."""

import random

from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.miniature.vocabulary import (
    BASE,
    FAMILIES,
    HELD_OUT,
    SUBJECT_FAMILIES,
    UNREADABLE,
    caption,
    sample,
    varied_caption,
)

seeds = st.integers(0, 2**32)
kinds = st.sampled_from(BASE["kind"])


@given(seed=seeds, kind=kinds)
def test_a_scene_has_every_family_of_its_kind_and_no_other(seed, kind):
    scene = sample(random.Random(seed), kind)
    expected = {"kind", "background", "style", *SUBJECT_FAMILIES[kind]}
    assert set(scene.attributes) - {"position"} == expected
    assert ("position" in scene.attributes) == (kind != "scene")
    assert all(value in BASE[family] for family, value in scene.attributes.items())


@given(seed=seeds, tags=st.booleans())
def test_the_full_caption_names_every_attribute(seed, tags):
    scene = sample(random.Random(seed))
    said = caption(scene, tags=tags)
    for family, value in scene.attributes.items():
        if (family, value) in {("accessory", "none"), ("kind", "toy"), ("kind", "object")}:
            continue
        words = {"beach": "beach", "night": "at night", "snow": "the snow", "plain": "plain"}
        assert words.get(value, value) in said, (family, value, said)


@given(seed=seeds)
def test_two_scenes_with_one_caption_have_the_same_attributes(seed):
    rng = random.Random(seed)
    one, other = sample(rng), sample(rng)
    assert (caption(one) == caption(other)) == (one.attributes == other.attributes)


@given(seed=seeds)
def test_a_varied_caption_says_nothing_that_is_not_so(seed):
    rng = random.Random(seed)
    scene = sample(rng)
    said = set(varied_caption(scene, rng, drop=0.5).replace(",", "").split())
    values = {v for family in FAMILIES for v in FAMILIES[family] if len(v) > 3}
    true = set(scene.attributes.values())
    # "plain" is a pattern and a background, "center" and "toy" are also plain words
    assert (said & values) - true <= {"plain", "scene"} | ({"center"} & said)


def test_dropping_nothing_and_everything():
    scene = sample(random.Random(3), "character")
    rng = random.Random(0)
    bare = {varied_caption(scene, rng, drop=1.0) for _ in range(200)}
    assert {"a character", "character"} <= bare
    assert all("hair" not in text and "at" not in text.split() for text in bare)


@given(seed=seeds, style=st.sampled_from(sorted(FAMILIES["style"])))
def test_readable_hides_what_the_style_hides(seed, style):
    scene = sample(random.Random(seed))
    restyled = type(scene)({**scene.attributes, "style": style})
    hidden = UNREADABLE.get(style, frozenset())
    assert set(restyled.readable()) == set(restyled.attributes) - hidden
    assert "style" in restyled.readable()


def test_held_out_values_are_not_in_the_base_world():
    for family, values in HELD_OUT.items():
        assert not set(values) & set(BASE[family])
