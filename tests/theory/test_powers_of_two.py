"""The model of rounding is torch's; its programs scale in every bit, and stop where it says."""

import math
from fractions import Fraction

import pytest
import sympy as sp
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lyco_lab.optimizers import OPTIMIZERS
from tests.strategies import seeds
from theory import is_zero
from theory.powers_of_two import STATE, Program, adamw, half_even, rnd, rounded, x

SETTINGS = {name: OPTIMIZERS["adamw"].powers[name] for name in ("lr", "eps", "weight_decay")}
DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}
every_dtype = pytest.mark.parametrize("dtype", DIGITS, ids=lambda dtype: str(dtype)[6:])


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_left_alone_has_no_weight(setting):
    with pytest.raises(TypeError, match="a sum of values of weights"):
        adamw(STATE | SETTINGS | {setting: 0})


def test_the_root_of_an_odd_weight_is_refused():
    with pytest.raises(TypeError, match="square root of a value of weight -3"):
        Program().value(-3).sqrt()


def test_a_factor_that_is_no_power_of_two_is_caught():
    for factor in (3, sp.sqrt(2), sp.Symbol("c", positive=True)):
        assert not is_zero(rnd(factor * x) - factor * rnd(x))


def exact(number: torch.Tensor) -> sp.Rational:
    return sp.Rational(Fraction(number.item()))


numbers = st.floats(min_value=0.01, max_value=100) | st.floats(min_value=-100, max_value=-0.01)


@every_dtype
@given(a=numbers, b=numbers)
def test_the_model_is_the_arithmetic_of_torch(dtype, a, b):
    left, right = torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)
    x, y = exact(left), exact(right)
    for actual, real in (
        (left + right, x + y),
        (left - right, x - y),
        (left * right, x * y),
        (left / right, x / y),
    ):
        assume(real == 0 or abs(real) > 2**-14)  # float16 is subnormal below
        assert exact(actual) == rounded(real, DIGITS[dtype], half_even)


@every_dtype
@given(seed=seeds, k=st.integers(-6, 6))
def test_a_root_depends_on_the_digits_alone(dtype, seed, k):
    """Even where, as in float32, torch does not give the nearest number to each."""
    x = (0.5 + torch.rand(1000, generator=torch.Generator().manual_seed(seed))).to(dtype)
    assert torch.equal((4.0**k * x).sqrt(), 2.0**k * x.sqrt())
    assert not torch.equal((2 * x).sqrt(), math.sqrt(2) * x.sqrt())


def program(theta, g, m, v, lr, eps, decay):
    """A bit of everything: a product of matrices, a softmax of what has no weight, AdamW."""
    mean, square = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g * g
    direction = mean / (square.sqrt() + eps)
    weightless = torch.softmax(theta @ g, dim=-1)
    direction = direction * (theta * g).sum().tanh() + weightless @ direction
    larger = torch.where(theta > theta.mean(), theta, -theta)
    return larger * (1 - lr * decay) - lr * direction, mean, square, weightless


def run(dtype, seed, s):
    rng = torch.Generator().manual_seed(seed)
    # Of size 1, as float16 has few numbers that are not subnormal.
    theta, g, m, v = (0.5 + 1.5 * torch.rand(4, 5, 5, generator=rng)).to(dtype)
    theta[::2] *= -1
    return program(s * theta, g / s, m / s, v / s**2, 0.1 * s, 0.01 / s, 0.3 / s)


def scaled_alike(dtype, seed, s):
    here, there = run(dtype, seed, 1.0), run(dtype, seed, s)
    weights = (1, -1, -2, 0)
    return all(torch.equal(b, a * s**w) for a, b, w in zip(here, there, weights, strict=True))


@every_dtype
@given(seed=seeds, k=st.integers(-2, 2))
def test_a_program_scales_in_every_bit(dtype, seed, k):
    assert scaled_alike(dtype, seed, 2.0**k)


@every_dtype
@pytest.mark.parametrize("s", [3.0, math.sqrt(2), 0.7])
def test_by_another_factor_it_does_not(dtype, s):
    assert not any(scaled_alike(dtype, seed, s) for seed in range(3))


@every_dtype
@given(seed=seeds, mantissa=st.floats(1, 2, exclude_max=True))
def test_the_edges_are_where_it_ends(dtype, seed, mantissa):
    """Scaling there and back gives the number back between the edges, and beyond them does not."""
    info, number = torch.finfo(dtype), torch.tensor(mantissa, dtype=dtype)
    full = number + torch.tensor(info.eps, dtype=dtype)  # an odd last digit, unless number has one
    odd = full if (full / info.eps).item() % 2 else number
    assume(odd < 2)
    smallest = round(math.log2(info.tiny))
    largest = round(math.log2(info.max))  # 2**largest itself is infinite

    def there_and_back(k):
        return torch.ldexp(torch.ldexp(odd, torch.tensor(k)), torch.tensor(-k))

    assert there_and_back(smallest) == odd
    assert there_and_back(largest - 1) == odd
    assert there_and_back(smallest - 1) != odd
    assert there_and_back(largest) != odd
