"""Mounting: what trains, what stays, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.dora import DoRA
from lyco_lab.adapters.ia3 import IA3
from lyco_lab.adapters.layer_adapter import BIAS
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach, survey
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.oft import OFT
from lyco_lab.errors import UserError


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
    assert names == {name for name in dict(net.named_modules()) if "mounts" not in name}
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
    def of_each(layer, factor):
        return (2.0 if layer == "conv" else 1.0) * (8.0 if factor == "a1_RQ" else 1.0)

    plain, halved, by_name = (
        attach(net_and_input()[0], LoHa(), NAMES, seed=0, init_scale=scale).state_dict()
        for scale in (1.0, 0.5, of_each)
    )
    for name, factor in plain.items():
        assert torch.equal(halved[name], 0.5 * factor)
        assert torch.equal(by_name[name], factor * of_each(*name.rsplit(".", 1)))


@pytest.mark.parametrize("cls", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_norms_are_those_of_the_applied_change(cls):
    net, _ = net_and_input()
    NAMES = ["norm"] if cls.takes == "norm" else ["conv", "block.0"]
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
        (LoRA(), ["conv", "norm"], "LoRA on the layer 'norm': it is a GroupNorm.*leave it out"),
        (LoRA(), ["block"], "it is a Sequential, and an adapter needs one of Linear.*leave it out"),
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
@pytest.mark.parametrize("factor", ["a_RQ", "b_PR"])
def test_refuses_a_start_that_cannot_train(scale, factor):
    net, _ = net_and_input()
    described = repr(net)
    with pytest.raises(ValueError, match=f"init_scale of factor '{factor}' of layer 'conv'"):
        attach(
            net,
            LoRA(rank=4),
            NAMES,
            seed=0,
            init_scale=lambda layer, name: scale if name == factor else 1.0,
        )
    with pytest.raises(ValueError, match="init_scale of factor .* of layer 'conv'"):
        attach(net, LoRA(rank=4), NAMES, seed=0, init_scale=scale)
    assert repr(net) == described


def test_refuses_one_layer_under_two_names():
    net, _ = net_and_input()
    net.alias = net.conv
    with pytest.raises(ValueError, match="'alias' is the same layer as 'conv'"):
        attach(net, LoRA(), ["conv", "alias"], seed=0)


def test_refuses_the_same_adapter_on_a_layer_again():
    net, _ = net_and_input()
    attach(net, LoRA(), ["conv"], seed=0)
    with pytest.raises(ValueError, match="'conv' already carries LoRA.*detach it first"):
        attach(net, LoRA(), ["conv", "block.0"], seed=0)


@pytest.mark.parametrize("second", [LoHa(rank=2), DoRA(of=LoRA(rank=3)), OFT(4), IA3()], ids=str)
@pytest.mark.parametrize("name", ["conv", "block.0"])
def test_the_changes_of_several_adapters_on_a_layer_add_up(second, name):
    net, x = net_and_input()
    plain = copy.deepcopy(net)
    one = attach(net, LoRA(rank=2), [name], seed=0)
    other = attach(net, second, [name], seed=1)
    move(one), move(other)
    other.strength = 0.5
    plain.get_submodule(name).weight.data += one.delta(name) + other.delta(name)
    torch.testing.assert_close(net(x), plain(x))
    gradients = torch.autograd.grad(net(x).sum(), [*one.parameters(), *other.parameters()])
    assert all(gradient.any() for gradient in gradients)


def test_adapters_on_one_layer_merge_and_come_off_in_any_order():
    net, x = net_and_input()
    base, before = net(x), net.conv.weight.clone()
    one, other = (attach(net, cls(rank=2), ["conv"], seed=0) for cls in (LoRA, LoHa))
    move(one), move(other)
    both = net(x)
    one.merge()
    torch.testing.assert_close(net(x), both)
    other.merge()
    assert type(net.conv) is nn.Conv2d
    torch.testing.assert_close(net(x), both)
    one.unmerge()
    torch.testing.assert_close(net(x), both)
    other.unmerge()
    assert torch.equal(net.conv.weight, before)
    assert torch.equal(net(x), both)
    one.detach()
    other.detach()
    assert torch.equal(net(x), base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("adapter", [LoRA(rank=2), Native(bias=True)], ids=["weight", "bias"])
def test_a_merge_that_overflows_is_an_error_and_changes_nothing(adapter, keep_base, dtype):
    net, _ = net_and_input()
    net.to(dtype)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mounted = attach(net, adapter, NAMES, seed=0)
    move(mounted)
    largest = float(torch.finfo(dtype).max)
    with torch.no_grad():
        factors = mounted.factors("block.0")
        if BIAS in factors:
            factors[BIAS][0] = 1.5 * largest if dtype == torch.float16 else float("inf")
        else:
            factors["b_PR"].fill_(largest**0.5), factors["a_RQ"].fill_(largest**0.5)
    words = f"cannot merge: the layer 'block.0' would hold .*, and {dtype} holds at most"
    with pytest.raises(UserError, match=words):
        mounted.merge(keep_base=keep_base)
    mounted.strength = 0.0  # it is as mounted as it was
    mounted.detach()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_is_left_of_several_may_overflow_as_well():
    net, _ = net_and_input()
    net.half()
    up, down, more = (attach(net, Native(alpha=a), ["conv"], seed=0) for a in (1.0, 2.0, 4.0))
    with torch.no_grad():
        for mounted, value in ((up, 4e4), (down, -2e4), (more, 1e4)):
            mounted.factors("conv")["diff"].fill_(value)
    for mounted in (up, down, more):
        mounted.merge()
    merged = net.conv.weight
    with pytest.raises(UserError, match="cannot unmerge: the layer 'conv' would hold 8"):
        down.unmerge()
    assert net.conv.weight is merged
    for mounted in (up, down, more):
        mounted.unmerge()


def test_what_depends_on_the_frozen_weight_keeps_it_from_being_merged():
    net, _ = net_and_input()
    one, other = (attach(net, adapter, ["conv"], seed=0) for adapter in (LoRA(), OFT(4)))
    with pytest.raises(ValueError, match="'conv' also carries OFT.*merge or detach that first"):
        one.merge()
    other.merge()
    one.merge()
    with pytest.raises(ValueError, match="an adapter is merged into it; unmerge"):
        attach(net, OFT(2), ["conv"], seed=0)


def test_patterns_match_whole_names_of_layers_that_can_be_adapted():
    net, _ = net_and_input()
    assert list(attach(net, LoRA(rank=2), ["b*"], seed=0).layers) == ["block.0", "block.2"]
    assert list(attach(net, IA3(), "block.?", seed=0).layers) == ["block.0", "block.2"]
    with pytest.raises(ValueError, match="the pattern 'lock.*' matches no layer of Net"):
        attach(net, LoHa(rank=2), ["lock.*"], seed=0)
    with pytest.raises(ValueError, match="'norm': it is a GroupNorm"):
        attach(net, LoHa(rank=2), ["*"], seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_a_weight_that_is_not_finite(value):
    net, _ = net_and_input()
    with torch.no_grad():
        net.block[0].weight[3, 2] = value
    with pytest.raises(ValueError, match="'block.0': its weight holds numbers that are not finite"):
        attach(net, LoRA(), ["conv", "block.0"], seed=0)
    assert type(net.conv) is nn.Conv2d


def test_explains_each_layer():
    net, _ = net_and_input()
    mounted = attach(net, LoRA(rank=2), ["conv", "block.0"], seed=0)
    rows = mounted.explain(tokens=8)
    assert [row.name for row in rows] == ["conv", "block.0"]
    assert [row.layer for row in rows] == ["Conv2d", "Linear"]
    assert [row.shape for row in rows] == [(8, 4, 3, 3), (12, 8)]
    assert [row.params for row in rows] == [2 * (8 + 36), 2 * (12 + 8)]
    assert all("LoRA(rank=2" in row.adapter and row.plan for row in rows)


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
    mounted = attach(net_and_input()[0], LoRA(rank=4), NAMES, seed=0)
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
    again = attach(mounted.model, LoRA(rank=4), NAMES, seed=0)
    with pytest.raises(ValueError, match="strength of an adapter must be finite, got nan"):
        again.strength = float("nan")


def test_the_base_returns_after_an_error_inside_disabled():
    net, x = net_and_input()
    mounted = attach(net, LoRA(rank=4), NAMES, seed=0)
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
    mounted = attach(net, LoRA(rank=4), NAMES, seed=0)
    move(mounted)
    copied, expected = copy.deepcopy(net), net(x)
    move(mounted)
    assert torch.equal(copied(x), expected)
    assert not torch.equal(net(x), expected)
