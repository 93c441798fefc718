"""Rotations: the definitions are the adapters that train, and additive updates would pass."""

import pytest
import sympy as sp
import torch

from lyco_lab.adapters import ADAPTERS
from theory import Counterexample
from theory.rotations import HALF, ROTATIONS, boft, offset, oft, turned


def in_the_adapter(kind, P, b, blocks):
    """R of the adapter, whose blocks are laid out one after another."""
    adapter = ADAPTERS[kind](block_size=b)
    eye = torch.eye(P, dtype=torch.float64)
    given = torch.tensor([block.tolist() for block in blocks], dtype=torch.float64)
    return eye + adapter.delta(eye, {"blocks": given.view(adapter.blocks_shape((P, P)))})


@pytest.mark.parametrize("b", [2, 3])
def test_oft_is_the_adapter_that_trains(b):
    """LyCORIS and so the adapter have Q = B^T - B for OFT: the other sense of rotation."""
    blocks = [turned(sp.Rational(n, 5), b) for n in range(1, b + 1)]
    expected = torch.tensor(oft(*blocks).tolist(), dtype=torch.float64)
    actual = in_the_adapter("oft", b * b, b, [block.T for block in blocks])
    torch.testing.assert_close(actual, expected)


def test_boft_is_the_adapter_that_trains():
    blocks = [turned(sp.Rational(n, 5)) for n in range(1, 5)]
    expected = torch.tensor(boft(*blocks).tolist(), dtype=torch.float64)
    torch.testing.assert_close(in_the_adapter("boft", 4, 2, blocks), expected)


@pytest.mark.parametrize("name", ROTATIONS)
def test_to_first_order_it_is_of_degree_one(name):
    """What is shown of finite rotations is not shown of infinitesimal ones."""
    q = sp.Symbol("q")
    E = offset(ROTATIONS[name], q).applyfunc(lambda e: sp.diff(e, q).subs(q, 0) * q)
    one, two = E.subs(q, HALF), E.subs(q, 1)
    assert not Counterexample("degree 1", two - 2 * one).holds()
    assert not Counterexample("parallel", one[0, 0] * two[0, 1] - one[0, 1] * two[0, 0]).holds()
    assert Counterexample("degree 2", two - 4 * one).holds()
