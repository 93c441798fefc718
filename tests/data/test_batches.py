"""What each step sees is a function of (seed, step, rank), and fair to every image."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.data.batches import Batches, Order, draw
from lyco_lab.data.cache import Cache
from lyco_lab.diffusion.model import Latents, Sizes

repeats = st.lists(st.integers(1, 4), min_size=1, max_size=8).map(tuple)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def order_naive(repeats, batch_size, seed, step, rank, ranks):
    """The definition: all epochs in one long list, cut into batches, dealt to the ranks in turn."""
    from lyco_lab.seeds import generator

    line = []
    epoch = 0
    while len(line) < (step + 1) * ranks * batch_size:
        shown = [i for i, times in enumerate(repeats) for _ in range(times)]
        rng = generator(seed, "order", epoch)
        line += [shown[j] for j in torch.randperm(len(shown), generator=rng)]
        epoch += 1
    batches = [line[i : i + batch_size] for i in range(0, len(line), batch_size)]
    return batches[step * ranks + rank]


@given(repeats, sizes, seeds, st.integers(0, 12), st.integers(1, 3))
def test_the_order_matches_its_definition(repeats, batch_size, seed, step, ranks):
    for rank in range(ranks):
        order = Order(repeats, batch_size, seed, rank, ranks)
        expected = order_naive(repeats, batch_size, seed, step, rank, ranks)
        assert order.indices(step).tolist() == expected


@given(repeats, sizes, seeds, st.integers(1, 3))
def test_an_epoch_shows_each_image_as_often_as_its_repeats(repeats, batch_size, seed, epochs):
    order = Order(repeats, batch_size, seed)
    total = epochs * sum(repeats)
    steps = -(-total // batch_size)
    shown = torch.cat([order.indices(step) for step in range(steps)])[:total].tolist()
    assert Counter(shown) == {i: epochs * times for i, times in enumerate(repeats)}


def cache(images=5, size=2):
    mean = torch.arange(float(images)).view(-1, 1, 1, 1).expand(-1, 4, size, size) * 10
    std = torch.full_like(mean, 0.1)
    ids = torch.arange(images + 1).view(-1, 1).expand(-1, 3)
    sizes = Sizes(*(torch.arange(images * 2).view(-1, 2) + 100 * i for i in range(3)))
    return Cache(Latents(mean, std), sizes, {"ids": ids, "ids_2": 10 * ids}, cut_captions=0)


def same(a, b):
    if a is None or b is None:
        return a is b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def batches(start=0, stop=8, seed=0, rank=0, dropout=0.5):
    order = Order((1,) * 5, 4, seed, rank, 2)
    return Batches(cache(), order, start, stop, timesteps=1000, caption_dropout=dropout)


@given(st.integers(0, 8), seeds)
def test_starting_later_gives_the_same_batches(start, seed):
    whole, rest = list(batches(seed=seed)), list(batches(start, seed=seed))
    assert len(rest) == len(batches(start)) == 8 - start
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = next(iter(batches()))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, next(iter(batches())))


def test_seeds_steps_and_ranks_draw_unrelated_noise():
    drawn = [
        next(iter(batches(start, seed=seed, rank=rank))).noise_BCHW
        for seed in (0, 1)
        for start in (0, 1)
        for rank in (0, 1)
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_batch_is_made_of_its_images():
    for batch in batches(dropout=0.0):
        torch.testing.assert_close(
            batch.latents_BCHW.mean((1, 2, 3)), batch.indices_B * 10.0, atol=0.2, rtol=0
        )
        assert torch.equal(batch.text["ids"][:, 0], batch.indices_B)
        assert torch.equal(batch.text["ids_2"], 10 * batch.text["ids"])
        for i, size_B2 in enumerate(batch.sizes):
            assert torch.equal(size_B2[:, 0], 2 * batch.indices_B + 100 * i)
        assert ((batch.timesteps_B >= 0) & (batch.timesteps_B < 1000)).all()


def test_dropped_captions_are_the_empty_one_at_the_asked_rate():
    order = Order((1,) * 5, 4, 0)
    rows = torch.cat(
        [
            draw(cache(), order, s, timesteps=1000, caption_dropout=0.2).text["ids"]
            for s in range(500)
        ]
    )
    assert abs((rows[:, 0] == 5).float().mean().item() - 0.2) < 0.03


def test_dropout_changes_nothing_else():
    for without, with_ in zip(batches(dropout=0.0), batches(dropout=1.0), strict=True):
        assert same(without._replace(text={}), with_._replace(text={}))
        assert (with_.text["ids"] == 5).all() and (with_.text["ids_2"] == 50).all()


def test_timesteps_cover_the_whole_range_evenly():
    order = Order((1,) * 5, 50, 0)
    drawn = torch.cat(
        [draw(cache(), order, s, timesteps=10, caption_dropout=0.0).timesteps_B for s in range(40)]
    )
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10 and counts.min() > 150 and counts.max() < 250
