"""Diag-OFT against its definition block by block, against LyCORIS, and as the rotation it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lyco_lab.adapters import forward, geometry, plan
from lyco_lab.adapters.kernel import FORM_TOKENS, SIDE_TOKENS
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.oft import OFT
from lyco_lab.linalg import cayley_grad, cayley_inverse, cayley_offset, split
from tests.strategies import layer_and_input, random_factors, random_weight, seeds

PLANS = [SIDE_TOKENS, FORM_TOKENS]
SHAPES = st.sampled_from([(12, 5), (10, 7), (9, 4), (8, 6, 3), (6, 2, 3, 2)])


def skew_naive(blocks, constraint, outputs):
    q = torch.stack([block - block.t() for block in blocks.flatten(0, -3)]).view(blocks.shape)
    norm = sum(float(entry) ** 2 for entry in q.flatten()) ** 0.5 + 1e-8
    largest = constraint * outputs
    return q * (largest / norm) if constraint and norm > largest else q


def oft_naive(weight, f, constraint=0.0):
    """The definition: each block turned by the transposed Cayley transform, row by row."""
    rows, out = weight.flatten(1), weight.flatten(1).clone()
    q_Nbb = skew_naive(f["blocks"], constraint, len(rows))
    N, b, _ = q_Nbb.shape
    eye = torch.eye(b, dtype=weight.dtype)
    for n in range(N):
        r = torch.linalg.solve(eye - q_Nbb[n], eye + q_Nbb[n])  # the two factors commute
        for i in range(b):
            out[n * b + i] = sum(r[j, i] * rows[n * b + j] for j in range(b))
    if "scale" in f:
        out = (1 + f["scale"].view(-1, 1)) * out
    return out.view(weight.shape)


@given(
    shape=SHAPES,
    size=st.integers(2, 6),
    constraint=st.sampled_from([0.0, 0.05, 100.0]),
    rescaled=st.booleans(),
    seed=seeds,
)
def test_matches_the_definition(shape, size, constraint, rescaled, seed):
    adapter = OFT(size, constraint, rescaled)
    weight = random_weight(shape, seed)
    if split(shape[0], size)[0] == 1:
        return
    factors = random_factors(adapter, weight, seed)
    naive = oft_naive(weight, factors, constraint)
    torch.testing.assert_close(adapter.adapted(weight, factors), naive, rtol=1e-11, atol=1e-11)


@given(shape=st.sampled_from([(12, 5), (8, 6, 3, 3)]), constraint=st.sampled_from([0.0, 0.05]),
       rescaled=st.booleans(), seed=seeds)  # fmt: skip
def test_lycoris_forms_the_same_update(shape, constraint, rescaled, seed):
    from lycoris.functional.diag_oft import diff_weight

    adapter, weight = OFT(4, constraint, rescaled), random_weight(shape, seed).float()
    factors = random_factors(adapter, weight, seed)
    tensors = adapter.to_file(shape, factors)
    rescale = tensors["rescale"].float() if rescaled else None
    theirs = diff_weight(weight, tensors["oft_blocks"], rescale, constraint=constraint * shape[0])
    torch.testing.assert_close(adapter.delta(weight, factors), theirs, rtol=1e-4, atol=1e-4)


@given(size=st.sampled_from([2, 3, 4]), strength=st.sampled_from([-2.0, 0.3, 1.0, 7.0]), seed=seeds)
def test_a_rotation_at_any_strength(size, strength, seed):
    adapter, weight = OFT(size), random_weight((12, 30), seed)
    factors = random_factors(adapter, weight, seed)
    turned = adapter.adapted(weight, {"blocks": strength * factors["blocks"]})
    torch.testing.assert_close(turned.t() @ turned, weight.t() @ weight, rtol=1e-10, atol=1e-10)
    kept, had = torch.linalg.svdvals(turned), torch.linalg.svdvals(weight)
    torch.testing.assert_close(kept, had, rtol=1e-11, atol=1e-11)
    identity = torch.eye(12, dtype=torch.float64)
    r = adapter.adapted(identity, {"blocks": strength * factors["blocks"]})
    torch.testing.assert_close(r @ r.t(), identity, rtol=0, atol=1e-13)
    assert torch.linalg.det(r) > 0


@given(size=st.integers(2, 7), seed=seeds)
def test_a_tiny_rotation_keeps_its_digits(size, seed):
    """R - I = 2 (Q + Q^2 + ...), of which three terms are exact here."""
    blocks = random_weight((3, size, size), seed)
    q = (blocks - blocks.mT) * 1e-6
    offset = cayley_offset(q)
    series = 2 * (q + q @ q + q @ q @ q)
    assert (offset - series).norm() <= 1e-12 * series.norm()


@given(size=st.integers(1, 7), seed=seeds)
def test_the_gradient_of_the_cayley_transform(size, seed):
    gr = random_weight((2, size, size), seed + 1)
    blocks = random_weight((2, size, size), seed)
    q = (blocks - blocks.mT).requires_grad_()
    eye = torch.eye(size, dtype=torch.float64)
    (expected,) = torch.autograd.grad((eye + q) @ torch.linalg.inv(eye - q), q, gr)
    q = q.detach()
    torch.testing.assert_close(cayley_grad(cayley_inverse(q), gr), expected)


def call(adapter, geometry_name, seed):
    """Tensors that require gradients, and the layer as a function of them."""
    layer, x = layer_and_input(geometry_name, seed)
    layer, x = layer.double(), x.double().requires_grad_()
    op = geometry.of(layer)
    factors = random_factors(adapter, layer.weight, seed)
    values = [(0.5 * factor).requires_grad_() for factor in factors.values()]
    bias = [layer.bias.detach().requires_grad_()] if layer.bias is not None else []

    def run(x, *rest):
        bias_or_none = rest[0] if bias else None
        given = dict(zip(factors, rest[len(bias) :], strict=True))
        weight = layer.weight.detach()
        return op.leave(plan.product(op, adapter, op.enter(x), weight, bias_or_none, given), x)

    return run, [x, *bias, *values]


@pytest.mark.parametrize(
    "name", ["linear", "linear without bias", "1x1", "strided", "circular", "1d"]
)
@pytest.mark.parametrize("forced", PLANS, ids=str)
@given(size=st.integers(2, 4), constraint=st.sampled_from([0.0, 0.05]), seed=seeds)
def test_every_plan_agrees_with_plain_autograd(name, forced, size, constraint, seed):
    run, inputs = call(OFT(size, constraint), name, seed)
    with plan.forced("reference"):
        expected = run(*inputs)
        direction = random_weight(tuple(expected.shape), seed + 1)
        wanted = torch.autograd.grad(expected, inputs, direction)
    with plan.forced(forced):
        y = run(*inputs)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        for one, other in zip(torch.autograd.grad(y, inputs, direction), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("forced", PLANS, ids=str)
@pytest.mark.parametrize("constraint", [0.0, 0.05])
def test_gradients_are_those_of_finite_differences(forced, constraint):
    run, inputs = call(OFT(3, constraint), "linear", 0)
    with plan.forced(forced):
        assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("forced", PLANS, ids=str)
def test_changing_the_output_in_place_is_an_error(forced):
    run, inputs = call(OFT(4), "linear", 0)
    with plan.forced(forced):
        y = run(*inputs)
    with pytest.raises(RuntimeError, match="modified (by an )?inplace|is being modified"):
        y.mul_(2).sum().backward()


@pytest.mark.parametrize("rescaled", [False, True])
def test_in_half_precision_a_small_rotation_stays(rescaled):
    layer, x = layer_and_input("3x3", 0)
    model = nn.Sequential(layer.bfloat16())
    mounted = attach(model, OFT(4, rescaled=rescaled), ["0"], seed=0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor += 1e-5 * torch.randn(factor.shape, generator=rng)
    frozen = forward.Frozen(layer, torch.bfloat16)
    change = mounted.adapter.change(frozen, x.bfloat16(), mounted.factors("0")).float()
    exact = torch.nn.functional.conv2d(x, mounted.delta("0"), padding=1)
    assert 0 < (change - exact).norm() < 0.01 * exact.norm()


def test_sizes_and_claims():
    adapter = OFT(16)
    assert adapter.blocks_shape((320, 7)) == (20, 16, 16)
    assert adapter.blocks_shape((1280, 7, 3, 3)) == (80, 16, 16)
    assert adapter.blocks_shape((48, 7)) == (8, 6, 6)  # at least as many blocks as rows in one
    assert adapter.num_params((320, 7)) == 20 * 16 * 16
    assert OFT(16, rescaled=True).num_params((320, 7)) == 20 * 16 * 16 + 320
    assert OFT(3).max_rank((12, 100)) == 4 * 2  # a skew matrix of odd size is singular
    assert OFT(3, rescaled=True).max_rank((12, 100)) == 12
    assert adapter.preserves == {"singular values"}
    assert not OFT(16, rescaled=True).preserves


@given(size=st.integers(2, 500), most=st.integers(2, 40))
def test_lycoris_reads_the_blocks_back(size, most):
    """Its loader derives the blocks from their size alone, by its own rule."""
    from lycoris.functional import factorization

    b, N = split(size, most)
    assert factorization(size, b) == (b, N)


@pytest.mark.parametrize(
    ("size", "outputs", "words"),
    [
        (16, 13, "block_size 16 cannot split 13 outputs.*needs this layer left out"),
        (2, 15, "block_size 2 cannot split 15.*a block_size of at least 3, or this layer"),
    ],
)
def test_refuses_what_does_not_split(size, outputs, words):
    with pytest.raises(ValueError, match=words):
        OFT(size).check((outputs, 8))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block_size": 1}, "block_size to be a whole number >= 2, got 1"),
        ({"block_size": 2.5}, "got 2.5"),
        ({"constraint": -0.1}, "constraint to be a finite number >= 0.*got -0.1"),
        ({"constraint": float("inf")}, "got inf"),
    ],
)
def test_refuses_impossible_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        OFT(**fields)


@given(seed=seeds)
def test_the_scale_is_written_with_all_its_digits(seed):
    adapter, weight = OFT(4, rescaled=True), random_weight((12, 8), seed).float()
    factors = random_factors(adapter, weight, seed)
    factors["scale"] *= 1e-3
    tensors = adapter.to_file((12, 8), factors)
    assert (tensors["rescale"] - 1).abs().max() < 0.01
    back = adapter.from_file((12, 8), tensors)
    assert torch.equal(back["scale"].float(), factors["scale"])
