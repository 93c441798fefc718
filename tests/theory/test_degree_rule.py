"""c = 1 + k - p: for no other c, at no other k or p, and of every optimizer that follows gamma."""

import pytest
import sympy as sp

from lyco_lab.optimizers import OPTIMIZERS
from theory import is_zero
from theory.degree_rule import DEGREES, difference, k, p


def test_every_optimizer_is_listed():
    assert set(DEGREES) == {kind for kind, cls in OPTIMIZERS.items() if not cls.no_gamma}


@pytest.mark.parametrize("wrong", [1, 1 + k, 1 - p, 1 + k + p, 2 + k - p])
def test_a_wrong_power_is_caught(wrong):
    assert is_zero(difference(1 + k - p))
    assert not is_zero(difference(sp.sympify(wrong)))
