"""Where memory runs out, images are drawn and decoded fewer at once, and are no others for it."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.diffusion import memory
from lyco_lab.diffusion.memory import AtOnce, NoMemory, ran_out
from lyco_lab.diffusion.model import load
from tests.short_of_memory import limited, out_of_memory

PROMPTS, SEEDS = ["a cat", "a dog", "a toy", "a hat", "a bat"], [5, 6, 7, 8, 9]


@pytest.fixture
def diffusion(tiny_sd):
    return load(tiny_sd)


def drawn(diffusion, at_once=None, count=5):
    return diffusion.sample(PROMPTS[:count], SEEDS[:count], 2, 3.0, at_once=at_once)


@given(count=st.integers(1, 40), most=st.integers(1, 40))
def test_pieces_are_halved_until_they_fit_and_every_image_is_drawn_once(count, most):
    failed = []

    def work(part):
        indices = list(range(count))[part]
        if len(indices) > most:
            failed.append(len(indices))
            out_of_memory()
        return indices

    at_once = AtOnce()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free", lambda: None)  # which takes its time
        found = at_once.draw(count, work, "")
    assert sum(found, []) == list(range(count))
    assert {len(piece) for piece in found[:-1]} <= {at_once.drawn}
    if count <= most:
        assert at_once == AtOnce() and not failed
    else:
        assert at_once.drawn <= most < 2 * at_once.drawn and at_once.decoded is None
    failed.clear()
    assert at_once.draw(count, work, "") == found and not failed


def real_of_torch():
    torch.empty(2**55)


def real_of_numpy():
    np.empty(2**50)


def of_the_driver():
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("fail", [out_of_memory, real_of_torch, real_of_numpy, of_the_driver])
def test_whatever_says_that_memory_ran_out_is_understood(diffusion, monkeypatch, capsys, fail):
    """Five prompts are ten samples with guidance; 5 -> 3 -> 2 fit into four."""
    whole = drawn(diffusion)
    pieces = [drawn_of(diffusion, part) for part in (slice(0, 2), slice(2, 4), slice(4, 5))]
    seen, at_once = limited(monkeypatch, diffusion.unet, "forward", 4, fail), AtOnce()
    found = drawn(diffusion, at_once)
    assert (found == np.concatenate(pieces)).all()
    assert np.abs(found.astype(int) - whole).max() <= 1
    assert at_once == AtOnce(drawn=2) and seen == [10, 6, *[4] * 4, 2, 2]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "memory ran out while drawing 5 images at once: now 3 at once",
        "memory ran out while drawing 3 images at once: now 2 at once",
    ]


def drawn_of(diffusion, part):
    return diffusion.sample(PROMPTS[part], SEEDS[part], 2, 3.0)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("out of memory")])
def test_other_errors_are_left_alone(diffusion, monkeypatch, error):
    def fail():
        raise error

    assert not ran_out(error)
    limited(monkeypatch, diffusion.unet, "forward", 4, fail)
    with pytest.raises(type(error)):
        drawn(diffusion)


def test_what_is_drawn_is_not_drawn_again_to_be_decoded(diffusion, monkeypatch, capsys):
    whole = drawn(diffusion, count=4)
    steps = limited(monkeypatch, diffusion.unet, "forward", 99)
    seen, at_once = limited(monkeypatch, diffusion.vae, "decode", 1), AtOnce()
    found = drawn(diffusion, at_once, count=4)
    assert np.abs(found.astype(int) - whole).max() <= 1
    assert at_once == AtOnce(decoded=1)
    assert steps == [8, 8] and seen == [4, 2, 1, 1, 1, 1]
    assert capsys.readouterr().out.count("while decoding") == 2


@pytest.mark.parametrize(
    ("part", "method", "doing"), [("unet", "forward", "drawing"), ("vae", "decode", "decoding")]
)
def test_where_not_even_one_fits_the_error_says_so(diffusion, monkeypatch, part, method, doing):
    limited(monkeypatch, getattr(diffusion, part), method, 0)
    with pytest.raises(NoMemory, match=f"while {doing} a single image of 64 x 64 pixels") as caught:
        drawn(diffusion)
    assert caught.value.__context__ is None  # whose traceback would hold all there was


def test_what_was_held_is_let_go_before_it_is_tried_again(diffusion, monkeypatch):
    held = []

    def fail():
        large = torch.zeros(10)
        cycle = [large]
        cycle.append(cycle)
        assert not [reference for reference in held if reference() is not None]
        held.append(weakref.ref(large))
        out_of_memory()

    limited(monkeypatch, diffusion.unet, "forward", 2, fail)
    drawn(diffusion)
    assert len(held) == 3
