"""DyLoRA: what a step trains is the LoRA cut to b ranks, with the scale of that rank."""

import pytest
import torch
from hypothesis import given
from torch import nn

from lyco_lab.adapters.dylora import DyLoRA
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from tests.strategies import alphas, move, random_factors, random_weight, ranks, seeds


@given(rank=ranks, alpha=alphas, seed=seeds)
def test_is_a_lora_where_nothing_is_cut(rank, alpha, seed):
    weight = random_weight((6, 4, 3, 2), seed)
    ours, lora = DyLoRA(rank=rank, alpha=alpha), LoRA(rank=rank, alpha=alpha)
    factors = random_factors(ours, weight, seed)
    assert torch.equal(ours.adapted(weight, factors), lora.adapted(weight, factors))
    assert ours.file_names.items() <= lora.file_names.items()
    assert ours.file_algo == lora.file_algo


def cut(weight, factors, b, alpha):
    """The paper: W + alpha / b * W_up[:, :b] W_down[:b, :], a sum of b rank-one matrices."""
    out = weight.clone()
    for r in range(b):
        out += alpha / b * torch.outer(factors["b_PR"][:, r], factors["a_RQ"][r])
    return out


@pytest.mark.parametrize(
    ("rank", "block", "cuts"), [(6, 2, {2, 4, 6}), (5, 2, {2, 4, 5}), (3, 8, {3})]
)
def test_a_step_trains_the_cut_adapter(rank, block, cuts):
    """Each cut comes, about as often as the others; values and gradients are its own."""
    model = nn.Sequential(nn.Linear(8, 10, bias=False, dtype=torch.float64))
    adapter = DyLoRA(rank=rank, alpha=2.5, block_size=block)
    mounted = attach(model, adapter, ["0"], seed=0)
    move(mounted, 1)
    x = random_weight((7, 8), 0)
    factors = mounted.factors("0")
    possible = {b: x @ cut(model[0].weight, factors, b, 2.5).T for b in cuts}
    seen = []
    for _ in range(90):
        y = model(x)
        (b,) = [b for b, want in possible.items() if torch.allclose(y, want, rtol=1e-9)]
        seen.append(b)
        got = torch.autograd.grad(y.sum(), list(factors.values()))
        wanted = torch.autograd.grad(possible[b].sum(), list(factors.values()), retain_graph=True)
        for gradient, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(gradient, want)
    for b in cuts:  # a binomial count: five standard deviations
        share, n = 1 / len(cuts), len(seen)
        assert abs(seen.count(b) - n * share) <= 5 * (n * share * (1 - share)) ** 0.5
    mounted.eval()
    torch.testing.assert_close(model(x), possible[rank])
    mounted.train()
    mounted.merge()
    torch.testing.assert_close(model(x), possible[rank])


def test_layers_are_cut_apart_and_a_seed_repeats():
    def cuts(seed):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        mounted = attach(model, DyLoRA(rank=8, block_size=1), ["0", "1"], seed=seed)
        move(mounted, 1)
        seen = []
        for _ in range(20):
            model(torch.ones(8))
            used = [layer.mounts[0].current()["b_PR"] for layer in model]
            seen.append([int(b_PR.any(0).sum()) for b_PR in used])
        return seen

    assert cuts(0) == cuts(0) != cuts(1)
    assert any(first != second for first, second in cuts(0))


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_refuses_no_block(size):
    with pytest.raises(ValueError, match="DyLoRA needs block_size to be a whole number >= 1"):
        DyLoRA(block_size=size)
