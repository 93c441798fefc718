"""Hints lead to the name that was meant, and stay silent otherwise."""

from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.errors import UserError, nearest

words = st.text("abcdefghij", min_size=4, max_size=12)


def test_a_slip_of_the_finger_is_recognised():
    assert nearest("trian", ["train", "generate"]) == " (did you mean 'train'?)"


def test_nothing_is_suggested_where_nothing_is_close():
    assert nearest("zzz", ["train", "generate"]) == ""
    assert nearest("train", []) == ""


@given(words, st.lists(words, max_size=5))
def test_capitals_do_not_matter_and_the_suggestion_keeps_its_own(word, others):
    others = [other for other in others if other.lower() != word]
    assert nearest(word.upper(), [*others, word.title()]) == f" (did you mean {word.title()!r}?)"


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)
