"""The held-out concepts, and the folders that teach them."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lyco_lab.data.folder import read
from lyco_lab.errors import UserError
from lyco_lab.miniature.concepts import CONCEPTS, TAUGHT_PLACES, concept, scenes, write
from lyco_lab.miniature.vocabulary import BASE, FAMILIES, HELD_OUT, varied_caption
from lyco_lab.miniature.world import pictures

every_concept = pytest.mark.parametrize("subject", CONCEPTS.values(), ids=CONCEPTS)


def test_there_are_ten_classes_or_more_over_the_five_categories():
    categories = {c.category for c in CONCEPTS.values()}
    assert categories == {"anime", "movie", "toy", "scene", "style"}
    assert len(CONCEPTS) >= 10
    assert len({c.trigger for c in CONCEPTS.values()}) == len(CONCEPTS)
    assert any(len(c.variants) > 1 for c in CONCEPTS.values())


def test_image_counts_are_unequal_and_repeats_even_them_out():
    assert len({c.images for c in CONCEPTS.values()}) > 5
    for c in CONCEPTS.values():
        assert 80 <= c.images * c.repeats <= 100


@every_concept
def test_each_concept_has_a_value_that_pretraining_never_shows(subject):
    for variant in subject.variants.values():
        assert any(
            value in HELD_OUT.get(family, ()) for family, value in variant.attributes.items()
        )
        assert all(value in FAMILIES[family] for family, value in variant.attributes.items())


@every_concept
def test_captions_have_the_papers_form_and_leave_the_concept_to_its_trigger(subject):
    for scene, _ in scenes(subject, seed=0):
        first, *phrases = subject.caption(scene).split(", ")
        assert first == f"{subject.trigger} {subject.class_word}"
        own = {v for f, v in subject.variants[scene.subclass or next(iter(subject.variants))]
               .attributes.items() if f != "kind"} - {"plain", "none"}  # fmt: skip
        spoken = " ".join(phrases).split()
        keyword = subject.variants[scene.subclass].keyword.split() if scene.subclass else []
        assert not own & (set(spoken) - set(keyword))


@every_concept
def test_training_shows_one_style_and_five_places(subject):
    for scene, _ in scenes(subject, seed=0):
        if subject.category != "style":
            assert scene["style"] == "flat"
        if subject.category != "scene":
            assert scene["background"] in TAUGHT_PLACES


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_base_caption_contains_a_trigger(seed):
    rng = random.Random(seed)
    for scene in pictures(2, seed).scenes:
        text = varied_caption(scene, rng)
        assert not any(c.trigger in text for c in CONCEPTS.values())


@pytest.mark.parametrize("name", ["kael", "falls", "neon"])
def test_a_written_folder_reads_back_as_a_dataset(name, tmp_path):
    subject = CONCEPTS[name]
    write(subject, tmp_path / name, seed=3)
    data = read(tmp_path / name)
    assert len(data.items) == subject.images
    assert set(data.repeats) == {subject.repeats}
    assert (data.trigger, data.class_word) == (subject.trigger, subject.class_word)
    for (scene, _), item in zip(scenes(subject, 3), data.items, strict=True):
        assert item.caption == subject.caption(scene)
        assert item.attributes == scene.readable()
        assert item.file.with_suffix(".txt").read_text().strip() == item.caption


def test_writing_twice_gives_the_same_bytes_and_another_seed_others(tmp_path):
    subject = CONCEPTS["dino"]
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(subject, tmp_path / folder, seed)
    pixels = {f: np.asarray(Image.open(tmp_path / f / "0004.png")) for f in "abc"}
    assert np.array_equal(pixels["a"], pixels["b"])
    assert not np.array_equal(pixels["a"], pixels["c"])
    lines = (tmp_path / "a" / "manifest.jsonl").read_text().splitlines()
    assert {json.loads(line)["concept"] for line in lines} == {"dino"}


def test_an_unknown_concept_suggests_the_nearest():
    with pytest.raises(UserError, match="'kale'.*did you mean 'kael'.*aurora"):
        concept("kale")


def test_the_base_world_is_untouched_by_concepts():
    assert not {v for values in HELD_OUT.values() for v in values} & set(BASE["background"])
