"""Native is fine-tuning: the same steps as training the weight itself."""

import torch
from hypothesis import given
from torch import nn

from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from tests.strategies import random_factors, random_weight, seeds, shapes


@given(shape=shapes(), seed=seeds)
def test_adds_its_offset(shape, seed):
    weight = random_weight(shape, seed)
    factors = random_factors(Native(), weight, seed)
    assert torch.equal(Native().adapted(weight, factors), weight + factors["diff"])


def test_trains_as_the_weight_would():
    torch.manual_seed(0)
    free, model = nn.Linear(6, 4, dtype=torch.float64), nn.Sequential(nn.Linear(6, 4)).double()
    model[0].load_state_dict(free.state_dict())
    x, target = torch.randn(9, 6).double(), torch.randn(9, 4).double()
    mounted = attach(model, Native(), ["0"], seed=0)
    optimizers = [
        torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
        for parameters in ([free.weight], mounted.parameters())
    ]
    for _ in range(5):
        for optimizer, net in zip(optimizers, (free, model), strict=True):
            optimizer.zero_grad()
            (net(x) - target).square().mean().backward()
            optimizer.step()
    mounted.merge()
    torch.testing.assert_close(model[0].weight, free.weight)


def test_trains_the_bias_where_it_is_asked_to():
    layer = nn.Linear(6, 4, dtype=torch.float64)
    model, x = nn.Sequential(layer), torch.randn(9, 6).double()
    assert attach(model, Native(), ["0"], seed=0).factors("0").keys() == {"diff"}
    model = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64))
    mounted = attach(model, Native(bias=True), ["0"], seed=0)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor.normal_()
    factors, frozen = mounted.factors("0"), mounted.base_bias("0")
    plain = nn.functional.linear(
        x, mounted.base_weight("0") + factors["diff"], frozen + factors["bias"]
    )
    torch.testing.assert_close(model(x), plain)
    trained = mounted.parameters()
    for gradient, want in zip(
        torch.autograd.grad(model(x).square().sum(), trained),
        torch.autograd.grad(plain.square().sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(gradient, want)
    mounted.merge()
    torch.testing.assert_close(model(x), plain)
    mounted.unmerge()
    assert mounted.base_bias("0") is frozen is model[0].bias
