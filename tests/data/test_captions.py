"""Drawing captions: what stays, what moves, and what is left out."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.data.captions import Captions, read, rng, says
from lyco_lab.data.headers import Unusable
from lyco_lab.errors import UserError

words = st.text("abcdefgh", min_size=1, max_size=4)
tags = st.lists(words, min_size=1, max_size=8)
seeds = st.integers(0, 2**31)
separators = st.sampled_from([",", ";", "|"])


@given(tags, st.integers(0, 9), separators, seeds)
def test_shuffling_keeps_all_tags_and_the_first_in_place(tags, keep, separator, seed):
    caption = f"{separator} ".join(tags)
    rule = Captions(shuffle=True, keep_tags=keep, separator=separator)
    drawn = rule.draw(caption, rng(seed)).split(f"{separator} ")
    assert drawn[:keep] == tags[:keep]
    assert Counter(drawn) == Counter(tags)


@given(tags, st.integers(0, 9), st.floats(0, 1), st.booleans(), seeds)
def test_dropping_takes_from_the_others_only(tags, keep, share, shuffle, seed):
    rule = Captions(shuffle=shuffle, keep_tags=keep, tag_dropout=share)
    drawn = [tag for tag in rule.draw(", ".join(tags), rng(seed)).split(", ") if tag]
    assert drawn[: min(keep, len(tags))] == tags[:keep]
    assert not Counter(drawn) - Counter(tags)
    if not shuffle:  # their order stays
        rest = iter(tags)
        assert all(tag in rest for tag in drawn)
    if share == 0:
        assert len(drawn) == len(tags)
    if share == 1:
        assert drawn == tags[:keep]


@given(tags, st.integers(0, 8), st.floats(0.1, 1), seeds)
def test_the_tag_with_the_trigger_neither_moves_nor_goes(tags, place, share, seed):
    tags = [*tags[:place], "a sks dog", *tags[place:]]
    rule = Captions(shuffle=True, tag_dropout=share, trigger="sks")
    drawn = rule.draw(", ".join(tags), rng(seed)).split(", ")
    assert drawn.count("a sks dog") == 1
    if share < 0.2 and len(drawn) == len(tags):
        assert drawn.index("a sks dog") == tags.index("a sks dog")


def test_the_trigger_is_added_where_it_lacks_and_all_is_framed():
    rule = Captions(trigger="sks", prefix="photo of ", suffix=", sharp")
    assert rule.draw("a dog, red") == "photo of sks a dog, red, sharp"
    assert rule.draw("a Sks, red") == "photo of a Sks, red, sharp"
    assert not rule.drawn


@pytest.mark.parametrize(
    ("prefix", "suffix", "said"),
    [
        ("a photo of", "in oil", "a photo of a dog in oil"),
        ("a photo of ", " in oil", "a photo of a dog in oil"),
        ("a photo,\n", "\tin oil", "a photo,\na dog\tin oil"),
        ("a photo of", ", sharp", "a photo of a dog, sharp"),
        ("", "", "a dog"),
    ],
)
def test_a_blank_is_between_a_caption_and_what_frames_it(prefix, suffix, said):
    assert Captions(prefix=prefix, suffix=suffix).draw("a dog") == said


@pytest.mark.parametrize(
    ("caption", "found"),
    [("a sks dog", True), ("SKS", True), ("sksy dog", False), ("a sks-dog", False), ("", False)],
)
def test_a_trigger_is_a_word_of_its_own(caption, found):
    assert says(caption, "sks") is found
    assert says("olis stuffed toy, pink", "olis stuffed toy")


def test_the_rates_are_those_asked_for():
    rule = Captions(shuffle=True, keep_tags=1, tag_dropout=0.3)
    drawn = [rule.draw("k, a, b, c", rng(i)).split(", ") for i in range(2000)]
    left = sum(len(d) - 1 for d in drawn) / (3 * 2000)
    assert abs(left - 0.7) < 0.02
    second = Counter(d[1] for d in drawn if len(d) > 1)
    assert max(second.values()) - min(second.values()) < 120


def test_one_seed_one_caption():
    rule = Captions(shuffle=True, tag_dropout=0.5)
    caption = "a, b, c, d, e, f"
    assert rule.draw(caption, rng(3)) == rule.draw(caption, rng(3))
    assert len({rule.draw(caption, rng(i)) for i in range(50)}) > 25
    assert rule.draw(caption) == caption  # nothing to draw with


def test_a_blank_separator_is_refused():
    with pytest.raises(UserError, match="the separator of tags is ' '"):
        Captions(separator=" ")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty caption: x.txt"),
        (b" \n\t", "empty caption: x.txt"),
        (b"\xff\xfea\x00", "caption not UTF-8: x.txt, at byte 0"),
        ("grün".encode("latin-1"), "caption not UTF-8: x.txt, at byte 2"),
        (b"a\x00b", "caption not UTF-8: x.txt holds zero bytes"),
        (b"a" * 70_000, "caption too long: x.txt has more than 65536 bytes"),
    ],
)
def test_captions_that_cannot_be_read(tmp_path, data, reason):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(Unusable) as caught:
        read(tmp_path / "x.txt")
    assert str(caught.value) == reason


def test_marks_of_other_editors_are_no_part_of_a_caption(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn\r\n")
    assert read(tmp_path / "x.txt") == "grün"
    with pytest.raises(Unusable, match="not readable"):
        read(tmp_path / "y.txt")
