"""Each image as often as its repeats, one size to a batch, all batches full, however many ranks."""

from collections import Counter
from fractions import Fraction

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.data.order import Order, arithmetic

seeds = st.integers(0, 2**31)
shares = st.sampled_from([Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(3, 5)])


@st.composite
def images(draw):
    """Repeats and buckets of some images."""
    count = draw(st.integers(1, 9))
    numbers = st.lists(st.integers(1, 3), min_size=count, max_size=count)
    return draw(numbers), draw(numbers)


def with_prior(repeats, buckets, batch_size, seed, share):
    """And a prior image in each of their buckets, behind them."""
    known = sorted(set(buckets))
    return Order(
        [*repeats, *[1] * len(known)],
        batch_size,
        seed,
        buckets=[*buckets, *known],
        prior=[False] * len(repeats) + [True] * len(known),
        prior_share=share,
    )


def counts(order, steps):
    return Counter(torch.cat([order.indices(step) for step in range(steps)]).tolist())


@given(images(), st.integers(1, 7), seeds)
def test_batches_are_full_and_of_one_bucket(images, batch_size, seed):
    repeats, buckets = images
    order = Order(repeats, batch_size, seed, buckets=buckets)
    for step in range(12):
        shown = order.indices(step).tolist()
        assert len(shown) == batch_size
        assert len({buckets[i] for i in shown}) == 1


@given(images(), st.integers(1, 7), seeds, st.integers(1, 4))
def test_after_each_epoch_every_image_was_shown_as_its_repeats_say(
    images, batch_size, seed, epochs
):
    repeats, buckets = images
    order = Order(repeats, batch_size, seed, buckets=buckets)
    if len(set(buckets)) == 1:
        steps = -(-epochs * sum(repeats) // batch_size)
    else:
        steps = next(s for s in range(500) if order.epoch(s) >= epochs)
    shown = counts(order, steps)
    for bucket in set(buckets):
        here = [i for i, b in enumerate(buckets) if b == bucket]
        ahead = 0
        for i in here:
            more = shown[i] - epochs * repeats[i]
            assert 0 <= more <= -(-batch_size // sum(repeats[j] for j in here)) * repeats[i]
            ahead += more
        assert ahead < batch_size


@given(images(), st.integers(1, 4), seeds, st.integers(1, 3), st.integers(0, 9))
def test_processes_share_what_one_would_see(images, batch_size, seed, ranks, step):
    repeats, buckets = images
    alone = Order(repeats, batch_size * ranks, seed, buckets=buckets).indices(step)
    shared = [
        Order(repeats, batch_size, seed, rank, ranks, buckets=buckets).indices(step)
        for rank in range(ranks)
    ]
    assert torch.equal(torch.cat(shared), alone)


@given(images(), st.integers(1, 5), seeds, st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_step_depends_on_none_before_it(images, batch_size, seed, steps):
    repeats, buckets = images
    order = Order(repeats, batch_size, seed, buckets=buckets)
    for step in steps:
        fresh = Order(repeats, batch_size, seed, buckets=buckets)
        assert torch.equal(order.indices(step), fresh.indices(step))


@given(images(), st.integers(1, 7), seeds)
def test_buckets_of_one_kind_change_nothing(images, batch_size, seed):
    repeats, _ = images
    plain, bucketed = (
        Order(repeats, batch_size, seed, buckets=b) for b in (None, [7] * len(repeats))
    )
    for step in range(5):
        assert torch.equal(plain.indices(step), bucketed.indices(step))


@given(images(), st.integers(1, 6), seeds, shares)
def test_prior_images_have_their_share_of_every_batch(images, batch_size, seed, share):
    repeats, buckets = images
    order = with_prior(repeats, buckets, batch_size, seed, share)
    places = Counter()
    priors = Counter()
    for step in range(30):
        shown = order.indices(step).tolist()
        bucket = {[*buckets, *sorted(set(buckets))][i] for i in shown}.pop()
        prior = sum(i >= len(repeats) for i in shown)
        assert abs(prior - batch_size * share) < 1
        places[bucket] += batch_size
        priors[bucket] += prior
        assert priors[bucket] == places[bucket] * share // 1


@given(images(), st.integers(1, 5), seeds, shares, st.integers(1, 3))
def test_epochs_with_prior_images_are_of_the_others(images, batch_size, seed, share, epochs):
    repeats, buckets = images
    buckets = [b % 2 for b in buckets]
    order = with_prior(repeats, buckets, batch_size, seed, share)
    steps = next(s for s in range(500) if order.epoch(s) >= epochs)
    shown = counts(order, steps + 1)
    for i, times in enumerate(repeats):
        assert shown[i] >= (epochs - 1) * times
    assert order.samples_per_epoch == sum(repeats)


def test_a_large_bucket_is_shown_more_often_in_proportion():
    order = Order([1] * 100, 4, 0, buckets=[0] * 90 + [1] * 10)
    shown = Counter(int(order.place(step)[0].bucket) for step in range(1000))
    assert abs(shown[1] - 100) <= 1


def test_a_hundred_thousand_images_take_milliseconds_a_step():
    rng = np.random.default_rng(0)
    order = Order(np.ones(10**5, np.int64), 8, 0, buckets=rng.integers(0, 9, 10**5))
    assert len(order.indices(3 * 12_500)) == 8
    assert len(order._epochs) < 64


def test_the_arithmetic_of_the_paper():
    said = arithmetic(1706, 5560, batch_size=8, steps=35_000)
    assert "8 of them per step (batch 8); 695 steps per epoch; 35000 steps = 50.36 epochs" in said
    said = arithmetic(
        10, 100, batch_size=2, accumulation=3, ranks=2, prior_share=Fraction(1, 2), steps=50
    )
    assert "6 of them per step (batch 2 x accumulation 3 x processes 2 x share" in said
    assert "50 steps = 3 epochs" in said
