"""Prompts ask for what the oracle can read, and for what was not taught."""

import pytest

from lyco_lab.errors import UserError
from lyco_lab.miniature.concepts import CONCEPTS, TAUGHT_PLACES, scenes
from lyco_lab.miniature.networks import VOCABULARY
from lyco_lab.miniature.prompts import KINDS, prompts

every_concept = pytest.mark.parametrize("name", CONCEPTS)


@every_concept
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_numbered_and_ask_for_known_values(name, kind):
    asked = prompts(name, kind, 23)
    if kind == "style" and CONCEPTS[name].category == "style":
        assert asked == []
        return
    assert [p.index for p in asked] == list(range(23))
    for p in asked:
        assert p.kind == kind and p.concept == name
        assert CONCEPTS[name].trigger in p.text
        assert all(v in VOCABULARY[f] for f, v in p.attributes.items())


@every_concept
def test_more_prompts_begin_with_the_fewer(name):
    for kind in KINDS:
        assert prompts(name, kind, 40)[:7] == prompts(name, kind, 7)


@every_concept
def test_train_prompts_are_the_training_captions(name):
    subject = CONCEPTS[name]
    asked = prompts(name, "train", subject.images)
    assert [p.text for p in asked] == [subject.caption(s) for s, _ in scenes(subject, 0)]


@every_concept
def test_alter_asks_for_places_that_were_not_taught(name):
    for p in prompts(name, "alter", 10):
        assert p.attributes.get("background") not in TAUGHT_PLACES
        if CONCEPTS[name].category not in ("scene", "style"):
            assert {"background", "position", "style"} == set(p.attributes)


@every_concept
def test_the_trigger_can_be_kept_replaced_or_dropped(name):
    subject = CONCEPTS[name]
    for kind in KINDS:
        for p in prompts(name, kind, 3):
            assert p.scored_text["keep"] == p.text
            assert p.scored_text["class"].startswith(subject.class_word)
            assert all(subject.trigger not in p.scored_text[k] for k in ("class", "drop"))
            assert p.scored_text["drop"]


def test_an_unknown_kind_suggests_the_nearest():
    with pytest.raises(UserError, match="'altre' is not one of.*did you mean 'alter'"):
        prompts("kael", "altre", 3)
