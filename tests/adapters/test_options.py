"""Dropouts are unbiased and repeatable, the scalar starts at nothing, norms are limited."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.oft import OFT
from lyco_lab.adapters.options import Options, Override
from lyco_lab.seeds import uniforms
from tests.strategies import layer_and_input, move

ADAPTERS = [LoRA(rank=3, alpha=2.0), LoHa(rank=2, alpha=1.5), LoKr(rank=1, factor=2), OFT(4)]
DROPOUTS = ["dropout", "rank_dropout", "module_dropout"]


def example(adapter, options, geometry="linear", seed=0):
    layer, x = layer_and_input(geometry, seed)
    model = nn.Sequential(layer)
    mounted = attach(model, adapter, ["0"], seed=seed, options=options)
    move(mounted, 1)
    return model, mounted, x


def test_uniforms_are_uniform_and_fresh():
    drawn = [uniforms(17, torch.tensor(step), 20_000, torch.device("cpu")) for step in (1, 2)]
    both = torch.stack(drawn).double()
    assert both.min() >= 0 and both.max() < 1
    # The mean of n uniforms has deviation 1 / sqrt(12 n), their correlation 1 / sqrt(n).
    assert (both.mean(1) - 0.5).abs().max() < 5 / math.sqrt(12 * 20_000)
    assert torch.corrcoef(both)[0, 1].abs() < 5 / math.sqrt(20_000)
    shifted = torch.stack([both[0, 1:], both[0, :-1]])
    assert torch.corrcoef(shifted)[0, 1].abs() < 5 / math.sqrt(20_000)
    counts = torch.histc(both[0], 20, 0, 1)
    assert ((counts - 1000).square() / 1000).sum() < 50  # chi squared, 19 degrees: p = 1e-4
    assert not torch.equal(drawn[0], uniforms(18, torch.tensor(1), 20_000, torch.device("cpu")))


@pytest.mark.parametrize("kind", DROPOUTS)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_a_dropout_leaves_the_change_unbiased(adapter, kind):
    if kind == "rank_dropout" and not adapter.components:
        with pytest.raises(ValueError, match=f"rank_dropout is 0.4.*{type(adapter).__name__}"):
            example(adapter, Options(rank_dropout=0.4))
        return
    model, mounted, x = example(adapter, Options(**{kind: 0.4}))
    with torch.no_grad():
        with mounted.disabled():
            base = model(x)
        mounted.eval()
        change = model(x) - base
        mounted.train()
        draws = torch.stack([model(x) - base for _ in range(3000)])
    assert draws.isfinite().all()
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert (deviation > 0).any()
    # Five deviations of a mean; some hundred entries, so about 1e-4 of false alarm.
    assert ((draws.mean(0) - change).abs() <= 5 * deviation + 1e-5).all()


def test_dropping_almost_everything_gives_no_nan():
    for kind in DROPOUTS:
        model, _, x = example(LoRA(rank=3), Options(**{kind: 0.99}))
        for _ in range(100):
            y = model(x)
            assert y.isfinite().all()
            y.sum().backward()


def test_module_dropout_drops_a_layer_whole():
    model, mounted, x = example(LoRA(rank=3), Options(module_dropout=0.5))
    with mounted.disabled():
        base = model(x)
    mounted.eval()
    change = model(x) - base
    mounted.train()
    seen = set()
    for _ in range(20):
        share = ((model(x) - base) / change).round(decimals=3)
        assert (share == share.flatten()[0]).all()
        seen.add(share.flatten()[0].item())
    assert seen == {0.0, 2.0}


@pytest.mark.parametrize("kind", DROPOUTS)
def test_what_is_dropped_depends_on_seed_name_and_step_alone(kind):
    def outputs(seed, steps):
        model, mounted, x = example(LoRA(rank=3), Options(**{kind: 0.5}))
        for mount in mounted.layers["0"].mounts:
            mount.key = mount.key + seed
        found = []
        for step in steps:
            mounted.step = step
            found.append(model(x).detach())
        return torch.stack(found)

    assert torch.equal(outputs(0, range(8)), outputs(0, range(8)))
    assert torch.equal(outputs(0, range(8))[5], outputs(0, [5])[0])
    assert not torch.equal(outputs(0, range(8)), outputs(1, range(8)))
    assert len(torch.unique(outputs(0, range(8)), dim=0)) > 1


@pytest.mark.parametrize("kind", DROPOUTS)
def test_a_checkpointed_block_drops_the_same_again(kind):
    layer, x = layer_and_input("linear", 0)

    class Net(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.block, self.again = nn.Sequential(layer, nn.SiLU()), again

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)

    found = []
    for again in (False, True):
        net = Net(again)
        mounted = attach(net, LoRA(rank=3), ["block.0"], seed=0, options=Options(**{kind: 0.5}))
        move(mounted, 1)
        gradients = []
        for _ in range(3):
            gradients += torch.autograd.grad(net(x).square().sum(), mounted.parameters())
        found.append(gradients)
        mounted.detach()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_dropouts_follow_the_modes_of_torch():
    model, mounted, x = example(LoRA(rank=3), Options(dropout=0.5))
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    mounted.train()
    assert not torch.equal(model(x), model(x))
    layer, x = layer_and_input("linear", 0)
    model = nn.Sequential(layer).eval()
    mounted = attach(model, LoRA(rank=3), ["0"], seed=0, options=Options(dropout=0.5))
    move(mounted, 1)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("adapter", ADAPTERS[:3], ids=lambda a: type(a).__name__)
def test_a_scalar_starts_at_nothing_and_trains(adapter):
    layer, x = layer_and_input("linear", 0)
    model = nn.Sequential(layer)
    base = model(x)
    mounted = attach(model, adapter, ["0"], seed=0, options=Options(use_scalar=True))
    torch.testing.assert_close(model(x), base)
    factors = mounted.factors("0")
    assert all(factor.any() for name, factor in factors.items() if name != "scalar")
    optimizer = torch.optim.SGD(mounted.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert factors["scalar"] != 0
    with torch.no_grad():
        factors["scalar"].fill_(1.0)
        whole = mounted.delta("0")
        factors["scalar"].fill_(-0.5)
    torch.testing.assert_close(mounted.delta("0"), -0.5 * whole)


@pytest.mark.parametrize("adapter", [*ADAPTERS, Native()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("geometry", ["linear", "3x3"])
def test_norms_are_limited_to_the_largest(adapter, geometry):
    model, mounted, _ = example(adapter, Options(max_norm=0.1), geometry)
    before = mounted.delta("0")
    assert before.norm() > 0.1
    mounted.limit_norms()
    after = mounted.delta("0")
    torch.testing.assert_close(after.norm().item(), 0.1, rtol=1e-5, atol=0)
    assert after.norm() <= 0.1 * (1 + 1e-6)
    if not isinstance(adapter, OFT):
        torch.testing.assert_close(after / after.norm(), before / before.norm())
    kept = {name: factor.clone() for name, factor in mounted.factors("0").items()}
    mounted.limit_norms()
    for name, factor in mounted.factors("0").items():
        torch.testing.assert_close(factor, kept[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dropout": 1.0}, r"dropout is 1.0, needs a number in \[0, 1\)"),
        ({"rank_dropout": -0.1}, "rank_dropout is -0.1"),
        ({"module_dropout": float("nan")}, "module_dropout is nan"),
        ({"max_norm": 0.0}, "max_norm is 0.0"),
        ({"max_norm": float("inf")}, "max_norm is inf"),
    ],
)
def test_refuses_what_is_no_option(fields, words):
    with pytest.raises(ValueError, match=words):
        Options(**fields)


@pytest.mark.parametrize(
    ("adapter", "options", "words"),
    [
        (Native(), Options(use_scalar=True), "use_scalar needs an update that is a product"),
        (OFT(4), Options(use_scalar=True), "use_scalar needs.*OFT is not"),
        (Native(), Options(rank_dropout=0.1), "the update of Native has no rank-one terms"),
        (LoKr(factor=2), Options(rank_dropout=0.1), "the update of LoKr has no rank-one terms"),
    ],
)
def test_refuses_an_option_that_would_do_nothing(adapter, options, words):
    layer, _ = layer_and_input("linear", 0)
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=f"layer '0' of shape .*{words}"):
        attach(model, adapter, ["0"], seed=0, options=options)
    assert type(model[0]) is nn.Linear


def test_refuses_to_drop_entries_of_indices():
    model = nn.Sequential(nn.Embedding(8, 6))
    with pytest.raises(ValueError, match="what an Embedding sees are whole numbers"):
        attach(model, LoRA(rank=2), ["0"], seed=0, options=Options(dropout=0.1))


def test_overrides_say_what_differs():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    mounted = attach(
        model,
        LoRA(rank=2, alpha=1.0, conv_rank=3),
        ["[0-3]"],
        seed=0,
        overrides={
            "[12]": Override(rank=4),
            "2": Override(alpha=8.0, lr=0.5),
            "3": Override(adapter=LoHa(rank=2)),
        },
    )
    assert mounted.adapter_of("0") == LoRA(rank=2, alpha=1.0, conv_rank=3)
    assert mounted.adapter_of("1") == LoRA(rank=4, alpha=1.0)
    assert mounted.adapter_of("2") == LoRA(rank=4, alpha=8.0)
    assert mounted.adapter_of("3") == LoHa(rank=2)
    rates = {group["lr"]: len(group["params"]) for group in mounted.param_groups(0.1)}
    assert rates == {0.1: 2 + 2 + 4, 0.5: 2}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"5": Override(rank=2)}, "the override '5' matches none of the 4 adapted layers"),
        ({"1": Override(rank=99)}, "layer '1'.*LoRA needs rank to be at most 8 here.*got 99"),
        ({"1": Override(adapter=Native(), rank=2)}, "sets rank = 2, which Native"),
    ],
)
def test_refuses_an_override_that_does_nothing(overrides, words):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    with pytest.raises(ValueError, match=words):
        attach(model, LoRA(rank=2), ["*"], seed=0, overrides=overrides)
    assert type(model[0]) is nn.Linear


def test_refuses_a_rate_that_is_none():
    with pytest.raises(ValueError, match="the lr of an override is 0.0"):
        Override(lr=0.0)
