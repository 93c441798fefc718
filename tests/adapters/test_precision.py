"""What is left of a small change in half precision, and what every mix of precisions gives.

The applied change is estimated by regression of the layer's difference on its input, over tokens:

    D = (sum (y' - y) x^T) (sum x x^T)^-1          share = <y' - y, D x> / <D x, D x>

y' and y are each rounded to a step of at most 2**-7 |y|, an error of standard deviation at most
2**-7 |y| / sqrt(12), mostly of its own in each. With |D| / |W| = 1e-3 the two errors over D x are
at most sqrt(2) * 2**-7 / sqrt(12) / 1e-3 = 3.2 times, 2.3 on average over where |y| lies between
two powers of two. Over T tokens of P outputs the share is out by 2.3 / sqrt(P T), which is 0.18 %
at T = P**5 = 1e5 and P = 16, and D, of Q times as many numbers to find, by sqrt(P Q) times that.
"""

import pytest
import torch
from torch import nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.mount import attach
from tests.strategies import move

MATRICES = {name: cls for name, cls in ADAPTERS.items() if cls.takes == "matrix"}
on_matrices = pytest.mark.parametrize("cls", MATRICES.values(), ids=MATRICES.keys())

TOKENS, SIDE, RATIO = 100_000, 16, 1e-3
NOISE = 2.3 / (SIDE * TOKENS) ** 0.5


def small(cls):
    return cls(**({"rank": 4} if "rank" in cls.__dataclass_fields__ else {}))


@torch.no_grad()
def shrink(mounted, ratio):
    """Bring the factors towards their start until |W' - W| = ratio |W|."""
    start = {name: value.clone() for name, value in mounted.state_dict().items()}
    move(mounted, 1)
    moved = {name: value.clone() for name, value in mounted.state_dict().items()}
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        at = {name: start[name] + middle * (moved[name] - start[name]) for name in start}
        mounted.load_state_dict(at)
        large = mounted.delta("0").norm() > ratio * mounted.base_weight("0").float().norm()
        low, high = (low, middle) if large else (middle, high)


def applied(cls, mode, make, *x_shape):
    """A layer's input, how its output differs with a small change, and the change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = nn.Sequential(make()), torch.randn(*x_shape)
    if mode == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    mounted = attach(model, small(cls), ["0"], seed=0).eval()
    shrink(mounted, RATIO)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        changed = model(x)
        with mounted.disabled():
            frozen = model(x)
        delta = mounted.delta("0").double()
    assert changed.dtype == torch.bfloat16
    # In bfloat16 is what the product sees.
    return x.bfloat16().double(), changed.double() - frozen.double(), delta


@on_matrices
@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_a_small_change_is_applied_in_full(cls, mode):
    x, difference, delta = applied(cls, mode, lambda: nn.Linear(SIDE, SIDE), TOKENS, SIDE)
    expected = x @ delta.T
    share = (difference * expected).sum() / expected.square().sum()
    assert abs(share - 1) < 0.01 > 5 * NOISE
    found = torch.linalg.lstsq(x, difference).solution.T
    assert (found - delta).norm() < 1.3 * SIDE * NOISE * delta.norm()


@on_matrices
@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_a_small_change_of_a_convolution_is_applied_in_full(cls, mode):
    """On average over positions; its own rounding has twice the deviation of one to the nearest."""
    shape = (TOKENS // 64, 4, 10, 10)
    x, difference, delta = applied(cls, mode, lambda: nn.Conv2d(4, SIDE, 3), *shape)
    expected = nn.functional.conv2d(x, delta)
    share = (difference * expected).sum() / expected.square().sum()
    assert abs(share - 1) < 0.01 > 3 * 1.6 * NOISE


GRADIENTS = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}


@on_matrices
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
@pytest.mark.parametrize("factors", ["float32", "same"])
def test_every_mix_of_precisions_trains(cls, dtype, factors, autocast):
    """Gradients are finite, in the factors' precision, and near those in float32."""
    lower = torch.float16 if autocast and dtype == torch.float16 else torch.bfloat16
    gradients = []
    for exact in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Conv1d(16, 16, 1))
            x = torch.randn(8, 16, 16)
            target = torch.randn(8, 16, 16)
        kept = torch.float32
        if not exact:
            model, x = model.to(dtype), x.to(dtype)
            kept = torch.float32 if factors == "float32" else dtype
        else:  # the same weights
            model, x = model.to(dtype).float(), x.to(dtype).float()
        mounted = attach(model, small(cls), ["0", "2"], seed=0, dtype=kept).eval()
        move(mounted, 1, size=0.1)
        with torch.autocast("cpu", lower, enabled=autocast and not exact):
            loss = (model(x).float() - target).square().mean()
        loss.backward()
        assert all(p.grad.dtype == p.dtype == kept for p in mounted.parameters())
        assert all(p.grad.isfinite().all() for p in mounted.parameters())
        gradients.append(torch.cat([p.grad.double().flatten() for p in mounted.parameters()]))
    wanted, got = gradients
    worst = GRADIENTS[lower if autocast and dtype == torch.float32 else dtype]
    assert (got - wanted).norm() < worst * wanted.norm()


@on_matrices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_merging_rounds_once_and_unmerging_not_at_all(cls, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
    before = model[0].weight.clone()
    mounted = attach(model, small(cls), ["0"], seed=0).eval()
    move(mounted, 1)
    exact = before.double() + mounted.delta("0").double()
    mounted.merge()
    nearest = exact.to(dtype)
    # Formed in float32, it can fall on the other side of the middle of two steps, rarely.
    assert (model[0].weight != nearest).double().mean() < 0.02
    step = torch.finfo(dtype).eps * exact.abs()
    assert ((model[0].weight.double() - exact).abs() <= 0.51 * step.clamp(min=1e-6)).all()
    mounted.unmerge()
    assert torch.equal(model[0].weight, before)
