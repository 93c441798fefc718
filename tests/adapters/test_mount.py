"""Mounting: what trains, what stays, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach, survey
from lyco_lab.adapters.native import Native


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.block = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 6, bias=False))

    def forward(self, x):
        return self.block(self.norm(self.conv(x)).movedim(1, -1))


NAMES = ["conv", "block.0", "block.2"]


def net_and_input():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(), torch.randn(2, 4, 7, 9)


def move(mounted, std=0.1):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor += std * torch.randn(factor.shape, generator=rng)


def test_only_factors_train():
    net, x = net_and_input()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mounted = attach(net, LoRA(rank=2), NAMES, seed=0)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in mounted.parameters()}
    assert mounted.num_params == sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        net(x).square().mean().backward()
        optimizer.step()
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value)
    assert all(norm > 0 for norm in mounted.norms().values())


def test_layers_keep_their_names_and_types():
    net, _ = net_and_input()
    names = set(dict(net.named_modules()))
    attach(net, LoHa(), NAMES, seed=0)
    assert names == {name for name in dict(net.named_modules()) if not name.endswith("factors")}
    assert isinstance(net.conv, nn.Conv2d)
    assert isinstance(net.block[0], nn.Linear)
    assert net.block[2].bias is None
    assert "(conv): AdaptedConv2d(" in repr(net)


def test_a_start_depends_on_seed_and_name_alone():
    def start(names, seed):
        return attach(net_and_input()[0], LoHa(), names, seed=seed).state_dict()

    all_three, one = start(NAMES, 5), start(["block.2"], 5)
    for name, factor in one.items():
        assert torch.equal(factor, all_three[name])
    assert not torch.equal(one["block.2.a1_RQ"], start(["block.2"], 6)["block.2.a1_RQ"])
    twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    state = attach(twins, LoHa(), ["0", "1"], seed=5).state_dict()
    assert not torch.equal(state["0.a1_RQ"], state["1.a1_RQ"])


def test_init_scale_multiplies_every_factor():
    plain, halved, by_name = (
        attach(net_and_input()[0], LoHa(), NAMES, seed=0, init_scale=scale).state_dict()
        for scale in (1.0, 0.5, lambda name: 2.0 if name == "conv" else 1.0)
    )
    for name, factor in plain.items():
        assert torch.equal(halved[name], 0.5 * factor)
        assert torch.equal(by_name[name], factor * (2.0 if name.startswith("conv.") else 1.0))


@pytest.mark.parametrize("cls", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_norms_are_those_of_the_applied_change(cls):
    net, _ = net_and_input()
    base = {name: net.get_submodule(name).weight.clone() for name in NAMES}
    mounted = attach(net, cls(), NAMES, seed=0)
    move(mounted)
    mounted.strength = 0.5
    norms = mounted.norms()
    mounted.merge()
    assert mounted.norms() == norms
    for name in NAMES:
        change = net.get_submodule(name).weight - base[name]
        torch.testing.assert_close(mounted.delta(name), change)
        torch.testing.assert_close(norms[name], change.norm().item(), rtol=1e-4, atol=0)


def test_factors_are_saved_and_loaded_alone():
    net, x = net_and_input()
    mounted = attach(net, LoKr(factor=2), NAMES, seed=0)
    move(mounted)
    state = {name: value.clone() for name, value in mounted.state_dict().items()}
    expected = net(x)
    again, _ = net_and_input()
    other = attach(again, LoKr(factor=2), NAMES, seed=9)
    other.load_state_dict(state)
    assert torch.equal(again(x), expected)
    assert state.keys() == {"conv.c_US", "conv.d_VT"} | {
        f"block.{i}.{key}" for i in (0, 2) for key in ("c_US", "d_VT")
    }


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("block.2.b_PR"), "'block.2.b_PR' is missing"),
        (lambda state: state.update({"block.0.b_PQ": 0}), "no factor.*did you mean 'block.0.b_PR'"),
        (lambda state: state.update({"block.2.b_PR": torch.ones(1)}), r"shape \(6, 3\) here"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil, words):
    mounted = attach(net_and_input()[0], LoRA(rank=3), NAMES, seed=0)
    before = {name: value.clone() for name, value in mounted.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    spoil(state)
    with pytest.raises(ValueError, match=words):
        mounted.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in mounted.state_dict().items())


@pytest.mark.parametrize(
    ("adapter", "names", "words"),
    [
        (LoRA(), [], "no layer of Net was named"),
        (LoRA(), ["block.0", "block.0"], "'block.0' is named twice"),
        (LoRA(), ["block.0", "block.3"], r"no layer 'block.3' \(did you mean 'block.[02]'\?\)"),
        (LoRA(), ["conv", "norm"], "'norm': it is a GroupNorm.*needs one of Linear.*leave it out"),
        (LoRA(), ["block"], "it is a Sequential"),
        (LoKr(factor=2), ["conv", "odd"], r"layer 'odd' of shape \(9, 8\).*cannot split 9 outputs"),
    ],
)
def test_refuses_before_it_changes_anything(adapter, names, words):
    net, _ = net_and_input()
    net.odd = nn.Linear(8, 9)
    described, trainable = repr(net), [p.requires_grad for p in net.parameters()]
    for act in (lambda: survey(net, adapter, names), lambda: attach(net, adapter, names, seed=0)):
        with pytest.raises(ValueError, match=words):
            act()
    assert repr(net) == described
    assert [p.requires_grad for p in net.parameters()] == trainable


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_refuses_a_start_that_cannot_train(scale):
    net, _ = net_and_input()
    described = repr(net)
    with pytest.raises(ValueError, match="init_scale of layer 'conv'"):
        attach(net, LoRA(), NAMES, seed=0, init_scale=scale)
    assert repr(net) == described


def test_refuses_one_layer_under_two_names():
    net, _ = net_and_input()
    net.alias = net.conv
    with pytest.raises(ValueError, match="'alias' is the same layer as 'conv'"):
        attach(net, LoRA(), ["conv", "alias"], seed=0)


def test_refuses_a_second_adapter_on_a_layer():
    net, _ = net_and_input()
    attach(net, LoRA(), ["conv"], seed=0)
    with pytest.raises(ValueError, match="'conv' already carries LoRA.*detach it first"):
        attach(net, LoHa(), NAMES, seed=0)


def test_two_adapters_share_a_model():
    net, x = net_and_input()
    first = attach(net, LoRA(), ["conv"], seed=0)
    second = attach(net, Native(), ["block.0"], seed=0)
    move(first), move(second)
    both = net(x)
    assert all(factor.requires_grad for factor in first.parameters() + second.parameters())
    second.detach()
    assert not torch.equal(net(x), both)
    assert type(net.conv) is not nn.Conv2d


def test_each_act_has_its_state():
    mounted = attach(net_and_input()[0], LoRA(), NAMES, seed=0)
    with pytest.raises(ValueError, match="cannot unmerge: the adapter is mounted"):
        mounted.unmerge()
    mounted.merge()
    for act in (
        mounted.merge,
        lambda: mounted.load_state_dict({}),
        lambda: mounted.disabled().__enter__(),
    ):
        with pytest.raises(ValueError, match=r"the adapter is merged; unmerge\(\) it first"):
            act()
    mounted.detach()  # merged or not
    with pytest.raises(ValueError, match="the adapter is detached; attach it again"):
        mounted.merge()
    again = attach(mounted.model, LoRA(), NAMES, seed=0)
    with pytest.raises(ValueError, match="strength of an adapter must be finite, got nan"):
        again.strength = float("nan")


def test_the_base_returns_after_an_error_inside_disabled():
    net, x = net_and_input()
    mounted = attach(net, LoRA(), NAMES, seed=0)
    move(mounted)
    mounted.strength = 0.75
    adapted = net(x)
    with pytest.raises(RuntimeError), mounted.disabled():
        raise RuntimeError
    assert mounted.strength == 0.75
    assert torch.equal(net(x), adapted)


def test_merging_leaves_a_layer_that_shares_the_weight():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    x = torch.randn(3, 4)
    mounted = attach(net, Native(), ["0"], seed=0)
    move(mounted)
    before = net(x)
    mounted.merge()
    torch.testing.assert_close(net(x), before)


def test_a_copied_model_keeps_its_own_factors():
    net, x = net_and_input()
    mounted = attach(net, LoRA(), NAMES, seed=0)
    move(mounted)
    copied, expected = copy.deepcopy(net), net(x)
    move(mounted)
    assert torch.equal(copied(x), expected)
    assert not torch.equal(net(x), expected)
