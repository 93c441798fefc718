"""T-LoRA against its definition, its start, its schedule, and LyCORIS' module."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.options import Options
from lyco_lab.adapters.tlora import TLoRA
from tests.strategies import alphas, move, random_factors, random_weight, ranks, seeds


def tlora_naive(w_PQ, f, scale, used):
    """The definition, one rank and one entry at a time."""
    out_PQ = w_PQ.clone()
    for p in range(w_PQ.shape[0]):
        for q in range(w_PQ.shape[1]):
            for r in range(used):
                trained = f["p_PR"][p, r] * f["l_1R"][0, r] * f["q_RQ"].flatten(1)[r, q]
                untrained = f["p0_PR"][p, r] * f["l0_1R"][0, r] * f["q0_RQ"].flatten(1)[r, q]
                out_PQ[p, q] += scale * (trained - untrained)
    return out_PQ


@given(rank=ranks, alpha=alphas, seed=seeds, shape=st.sampled_from([(5, 7), (5, 2, 1, 3)]))
def test_matches_the_definition(rank, alpha, seed, shape):
    adapter, weight = TLoRA(rank=rank, alpha=alpha), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    naive = tlora_naive(weight.flatten(1), factors, alpha / rank, rank)
    torch.testing.assert_close(adapter.adapted(weight, factors).flatten(1), naive)


@pytest.mark.parametrize(
    ("start_from", "taken"), [("principal", [0, 1]), ("last", [4, 5]), ("middle", [2, 3])]
)
@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 3, 3)])
def test_starts_from_the_singular_vectors_it_names(start_from, taken, shape):
    weight = random_weight(shape, 0)
    start = TLoRA(rank=2, start_from=start_from).init(weight, torch.Generator())
    values = torch.linalg.svdvals(weight.flatten(1))
    torch.testing.assert_close(start["l_1R"], values[None, taken])
    for r, index in enumerate(taken):
        right, left = start["q_RQ"][r].flatten(), start["p_PR"][:, r]
        torch.testing.assert_close(weight.flatten(1) @ right, values[index] * left)
    for name in ("p_PR", "l_1R", "q_RQ"):
        assert torch.equal(start[name], start[name.replace("_", "0_")])


@given(rank=st.integers(2, 40), least=st.integers(1, 8), t=st.integers(0, 1000))
def test_the_schedule_is_the_papers(rank, least, t):
    """r(t) = floor((T - t) / T (r - r_min)) + r_min, in whole numbers."""
    least = min(least, rank)
    adapter = TLoRA(rank=rank, min_rank=least)
    gate = adapter.gate(torch.tensor([t]), {"l_1R": torch.zeros(1, rank)})
    used = (1000 - t) * (rank - least) // 1000 + least
    assert gate.shape == (1, rank)
    assert gate[0].tolist() == [1.0] * used + [0.0] * (rank - used)


class Timed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, sample, timestep):
        return self.layer(sample)


LAYERS = {
    "linear": (lambda: nn.Linear(8, 10, dtype=torch.float64), (3, 5, 8)),
    "conv": (lambda: nn.Conv2d(8, 10, 3, stride=2, dtype=torch.float64), (3, 8, 7, 6)),
}


@pytest.mark.parametrize("timesteps", [250, [900, 0, 400]], ids=["one for all", "one each"])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_sample_has_the_rank_of_its_timestep(kind, timesteps):
    make, shape = LAYERS[kind]
    model = Timed(make())
    adapter = TLoRA(rank=6, alpha=2.5, min_rank=2)
    mounted = attach(model, adapter, ["layer"], seed=0)
    move(mounted, 1)
    factors = mounted.factors("layer")
    x = random_weight(shape, 0).requires_grad_()
    y = model(x, torch.tensor(timesteps))
    each = timesteps if isinstance(timesteps, list) else [timesteps] * 3
    rows, base = [], mounted.base_weight("layer")
    for sample, t in zip(x, each, strict=True):
        used = (1000 - t) * 4 // 1000 + 2
        weight = tlora_naive(base.flatten(1), factors, 2.5 / 6, used).view(base.shape)
        state = {"weight": weight, "bias": model.layer.bias}
        rows.append(torch.func.functional_call(make(), state, (sample[None],))[0])
    torch.testing.assert_close(y, torch.stack(rows))
    inputs = [x, *mounted.parameters()]
    got = torch.autograd.grad(y.square().sum(), inputs)
    wanted = torch.autograd.grad(torch.stack(rows).square().sum(), inputs)
    for gradient, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, want)
    assert not mounted.is_one_weight
    with pytest.raises(ValueError, match="depends on the timestep"):
        mounted.merge()


def test_the_timestep_has_to_be_known():
    with pytest.raises(ValueError, match="Sequential is not called with one"):
        attach(nn.Sequential(nn.Linear(8, 8)), TLoRA(rank=4, min_rank=2), ["0"], seed=0)
    model = Timed(nn.Linear(8, 8))
    mounted = attach(model, TLoRA(rank=4, min_rank=2), ["layer"], seed=0)
    move(mounted, 1)
    with pytest.raises(ValueError, match="got 2 timesteps and a batch of 3"):
        model(torch.ones(3, 8), torch.tensor([1, 2]))


def test_half_precision_keeps_a_small_change():
    """P diag(l) Q and its copy are as large as W; their difference is taken before rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).bfloat16()
    mounted = attach(model, TLoRA(rank=4, alpha=4.0), ["0"], seed=0)
    move(mounted, 1, size=1e-4)
    x = torch.randn(4000, 16).bfloat16()
    change = model(x).double() - nn.functional.linear(x, mounted.base_weight("0")).double()
    expected = x.double() @ mounted.delta("0").double().T
    share = (change * expected).sum() / expected.square().sum()
    assert abs(share - 1) < 0.05


@pytest.mark.parametrize("start_from", ["principal", "last", "middle"])
def test_agrees_with_lycoris(start_from):
    tlora = pytest.importorskip("lycoris.modules.tlora")
    layer = nn.Linear(12, 10)
    theirs = tlora.TLoraModule("x", layer, lora_dim=4, alpha=2.5, sig_type=start_from)
    adapter = TLoRA(rank=4, alpha=2.5, start_from=start_from)
    start = adapter.init(layer.weight.detach(), torch.Generator())
    torch.testing.assert_close(start["l_1R"], theirs.lambda_layer.detach())
    with torch.no_grad():
        for parameter in (theirs.q_layer.weight, theirs.p_layer.weight, theirs.lambda_layer):
            parameter += 0.1 * torch.randn(parameter.shape)
    factors = {
        "p_PR": theirs.p_layer.weight,
        "l_1R": theirs.lambda_layer,
        "q_RQ": theirs.q_layer.weight,
        "p0_PR": theirs.base_p,
        "l0_1R": theirs.base_lambda,
        "q0_RQ": theirs.base_q,
    }
    mask = tlora.compute_timestep_mask(300, 1000, 4, min_rank=1)
    gate = TLoRA(rank=4, min_rank=1).gate(torch.tensor([300]), factors)
    assert torch.equal(gate, mask)
    tlora.set_timestep_mask(mask)
    try:
        masked = factors | {name: factors[name] * gate for name in adapter.scaling}
        torch.testing.assert_close(adapter.delta(layer.weight, masked), theirs.get_diff_weight()[0])
    finally:
        tlora.clear_timestep_mask()


def test_refuses_options_that_have_no_meaning():
    for fields, words in [
        ({"start_from": "first"}, "one of principal, last, middle, got 'first'"),
        ({"min_rank": 0}, "null or a whole number >= 1"),
        ({"last_timestep": math.inf}, "a finite number > 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            TLoRA(**fields)
    with pytest.raises(ValueError, match="min_rank to be at most the rank, which is 2 here"):
        TLoRA(rank=2, min_rank=3).check((8, 8))
    with pytest.raises(ValueError, match="use_scalar"):
        Options(use_scalar=True).check(TLoRA(), (16, 16), "Linear")
