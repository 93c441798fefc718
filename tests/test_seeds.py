"""Streams depend on their purpose alone, and are unrelated to each other."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.seeds import derive, generator

seeds = st.integers(min_value=0, max_value=2**64)
parts = st.one_of(st.integers(min_value=0, max_value=10**9), st.text(max_size=8))
streams = st.lists(parts, max_size=4)


def draw(rng):
    return torch.randint(2**60, (4,), generator=rng).tolist()


@given(seeds, streams)
def test_the_same_stream_gives_the_same_draws_whatever_was_drawn_before(seed, stream):
    first = draw(generator(seed, *stream))
    torch.rand(3, generator=generator(seed, "something else"))
    assert draw(generator(seed, *stream)) == first


@given(seeds, streams, seeds, streams)
def test_different_streams_differ(seed, stream, other_seed, other_stream):
    if (seed, stream) != (other_seed, other_stream):
        assert derive(seed, *stream) != derive(other_seed, *other_stream)


def test_a_stream_is_not_the_text_of_another():
    streams = [("ab", "c"), ("a", "bc"), ("abc",), (1,), ("1",), (1, ""), ()]
    assert len({derive(0, *stream) for stream in streams}) == len(streams)


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    draw(generator(3, "noise", 7, 0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_streams_never_change_between_versions():
    assert derive(0, "noise", 1, 0) == 3597282282557732139  # all published results hang on it
