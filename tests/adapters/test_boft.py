"""BOFT against its definition permutation by permutation, against LyCORIS, and as a rotation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lyco_lab.adapters import boft, forward, geometry, plan
from lyco_lab.adapters.boft import BOFT, Stages, fusions
from lyco_lab.adapters.kernel import FORM_DENSE, FORM_TOKENS, SIDE_TOKENS
from lyco_lab.adapters.mount import attach
from lyco_lab.linalg import butterfly_block
from tests.strategies import layer_and_input, random_factors, random_weight, seeds

PLANS = [SIDE_TOKENS, FORM_TOKENS, FORM_DENSE]
SHAPES = st.sampled_from([(12, 5), (16, 7), (24, 4), (8, 6, 3), (12, 2, 3, 2)])


def permutation(outputs, stage, h):
    """Where each row stands for the blocks of a stage, as the paper's block butterflies order them.

    Rows whose numbers agree but for a bit of row // h stand together, in pairs.
    """
    order = []
    span = h * 2**stage
    for start in range(0, outputs, 2 * span):
        for offset in range(span):
            order += [start + offset, start + span + offset]
    return order


def boft_naive(weight, f, constraint=0.0):
    """The definition: permute the rows, turn each block of b, permute back; stage after stage."""
    rows = weight.flatten(1).clone()
    blocks = f["blocks"]
    q = torch.stack([block - block.t() for block in blocks.flatten(0, 1)]).view(blocks.shape)
    norm = sum(float(entry) ** 2 for entry in q.flatten()) ** 0.5 + 1e-8
    if constraint and norm > constraint * len(rows):
        q = q * (constraint * len(rows) / norm)
    m, N, b, _ = q.shape
    eye = torch.eye(b, dtype=weight.dtype)
    for i in range(m):
        order = permutation(len(rows), i, b // 2)
        out = torch.empty_like(rows)
        for n in range(N):
            r = torch.linalg.solve(eye - q[i, n], eye + q[i, n])
            own = order[n * b : (n + 1) * b]
            for j in range(b):
                out[own[j]] = sum(r[j, k] * rows[own[k]] for k in range(b))
        rows = out
    if "scale" in f:
        rows = (1 + f["scale"].view(-1, 1)) * rows
    return rows.view(weight.shape)


@given(
    shape=SHAPES,
    size=st.sampled_from([2, 4, 6, 8]),
    constraint=st.sampled_from([0.0, 0.05, 100.0]),
    rescaled=st.booleans(),
    seed=seeds,
)
def test_matches_the_definition(shape, size, constraint, rescaled, seed):
    if butterfly_block(shape[0], size) is None:
        return
    adapter, weight = BOFT(size, constraint, rescaled), random_weight(shape, seed)
    factors = random_factors(adapter, weight, seed)
    naive = boft_naive(weight, factors, constraint)
    torch.testing.assert_close(adapter.adapted(weight, factors), naive, rtol=1e-11, atol=1e-11)


@given(shape=st.sampled_from([(12, 5), (16, 5), (16, 6, 3, 3)]), rescaled=st.booleans(),
       constraint=st.sampled_from([0.0, 0.05]), seed=seeds)  # fmt: skip
def test_lycoris_forms_the_same_update(shape, constraint, rescaled, seed):
    from lycoris.functional.boft import diff_weight

    adapter, weight = BOFT(6, constraint, rescaled), random_weight(shape, seed).float()
    factors = random_factors(adapter, weight, seed)
    tensors = adapter.to_file(shape, factors)
    rescale = tensors["rescale"].float() if rescaled else None
    theirs = diff_weight(weight, tensors["oft_blocks"], rescale, constraint=constraint * shape[0])
    torch.testing.assert_close(adapter.delta(weight, factors), theirs, rtol=1e-4, atol=1e-4)


@given(size=st.integers(2, 3000), most=st.integers(2, 64))
def test_blocks_are_those_of_lycoris(size, most):
    from lycoris.functional import power2factorization

    b, N = power2factorization(size, most)
    ours = butterfly_block(size, most)
    assert ours == (b if N else None)
    if N:
        m, *rest = BOFT(most).blocks_shape((size, 1))
        assert rest == [N, b, b]
        assert m == sum(int(digit) for digit in f"{N - 1:b}") + 1
        assert power2factorization(size, b) == (b, N)  # as its loader derives them


@given(size=st.sampled_from([2, 4, 6]), strength=st.sampled_from([-2.0, 0.3, 1.0, 7.0]), seed=seeds)
def test_a_rotation_at_any_strength(size, strength, seed):
    outputs = 24 if size == 6 else 16
    adapter, weight = BOFT(size), random_weight((outputs, 30), seed)
    factors = random_factors(adapter, weight, seed)
    turned = adapter.adapted(weight, {"blocks": strength * factors["blocks"]})
    kept, had = torch.linalg.svdvals(turned), torch.linalg.svdvals(weight)
    torch.testing.assert_close(kept, had, rtol=1e-11, atol=1e-11)
    identity = torch.eye(outputs, dtype=torch.float64)
    r = adapter.adapted(identity, {"blocks": strength * factors["blocks"]})
    torch.testing.assert_close(r @ r.t(), identity, rtol=0, atol=1e-13)
    assert r.count_nonzero() == r.numel()  # every output sees every other
    assert torch.linalg.matrix_rank(r - identity) == outputs


@given(seed=seeds)
def test_a_tiny_rotation_keeps_its_digits(seed):
    """R - I to second order is the sum of what the stages do, and of their products in order."""
    adapter, identity = BOFT(4), torch.eye(16, dtype=torch.float64)
    blocks = 1e-6 * random_factors(adapter, identity, seed)["blocks"]
    offset = adapter.delta(identity, {"blocks": blocks})
    skews = []
    for stage, q in enumerate(blocks - blocks.mT):
        order = permutation(16, stage, 2)
        dense = torch.zeros_like(identity)
        for n in range(len(q)):
            own = torch.tensor(order[4 * n : 4 * n + 4])
            dense[own[:, None], own] = q[n]
        skews.append(dense)
    first = 2 * sum(skews)
    second = 2 * sum(q @ q for q in skews)
    second += 4 * sum(skews[i] @ skews[j] for i in range(len(skews)) for j in range(i))
    assert (offset - first - second).norm() <= 1e-10 * first.norm()  # third order is 1e-12
    assert (offset - first).norm() > 1e-8 * first.norm()


@pytest.mark.parametrize("shape", [(320, 16), (640, 16), (1280, 16), (768, 16), (16, 16), (4, 64)])
def test_every_stage_is_fused_once(shape):
    outputs, size = shape
    blocks_shape = BOFT(size).blocks_shape((outputs, 1))
    groups = fusions(blocks_shape)
    assert [s for g in groups for s in range(g.first, g.first + g.count)] == list(
        range(blocks_shape[0])
    )
    for stages in groups:
        assert stages.rows <= max(boft.FUSED_ROWS, 2 * stages.half)


@given(first=st.integers(0, 2), count=st.integers(1, 3), seed=seeds)
def test_gathering_is_undone(first, count, seed):
    stages, rows = Stages(first, count, 3), random_weight((3 * 2**6, 5), seed)
    fused = stages.gather(rows)
    assert fused.shape[1] == stages.rows
    assert torch.equal(stages.scatter(fused), rows)
    for stage in range(count):
        assert torch.equal(stages.without(stage, stages.within(stage, fused)), fused)


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


NAMES = ["linear", "linear without bias", "1x1", "strided", "circular", "1d"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("forced", PLANS, ids=str)
@given(
    size=st.sampled_from([2, 4, 6]),
    fused=st.sampled_from([2, 8, 40]),
    constraint=st.sampled_from([0.0, 0.05]),
    seed=seeds,
)
def test_every_plan_agrees_with_plain_autograd(name, forced, size, fused, constraint, seed):
    outputs = 12 if name in ("linear", "1x1") else 8
    if butterfly_block(outputs, size) is None:
        return
    run, inputs = call(BOFT(size, constraint), name, seed)
    with pytest.MonkeyPatch.context() as patch, plan.forced("reference"):
        patch.setattr(boft, "FUSED_ROWS", 2)  # each stage by itself
        expected = run(*inputs)
        direction = random_weight(tuple(expected.shape), seed + 1)
        wanted = torch.autograd.grad(expected, inputs, direction)
    with pytest.MonkeyPatch.context() as patch, plan.forced(forced):
        patch.setattr(boft, "FUSED_ROWS", fused)
        y = run(*inputs)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        for one, other in zip(torch.autograd.grad(y, inputs, direction), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("forced", PLANS, ids=str)
@pytest.mark.parametrize("constraint", [0.0, 0.05])
def test_gradients_are_those_of_finite_differences(forced, constraint):
    run, inputs = call(BOFT(6, constraint), "linear", 0)
    with plan.forced(forced):
        assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("rescaled", [False, True])
def test_in_half_precision_a_small_rotation_stays(rescaled):
    layer, x = layer_and_input("3x3", 0)
    model = nn.Sequential(layer.bfloat16())
    mounted = attach(model, BOFT(2, rescaled=rescaled), ["0"], seed=0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor += 1e-5 * torch.randn(factor.shape, generator=rng)
    frozen = forward.Frozen(layer, torch.bfloat16)
    change = mounted.adapter.change(frozen, x.bfloat16(), mounted.factors("0")).float()
    exact = torch.nn.functional.conv2d(x, mounted.delta("0"), padding=1)
    assert 0 < (change - exact).norm() < 0.02 * exact.norm()


def test_sizes_and_claims():
    assert BOFT(16).blocks_shape((320, 7)) == (6, 32, 10, 10)
    assert BOFT(16).blocks_shape((1280, 7, 3, 3)) == (8, 128, 10, 10)
    assert BOFT(16).blocks_shape((16, 7)) == (1, 1, 16, 16)
    assert BOFT(16).num_params((320, 7)) == 6 * 32 * 100
    assert BOFT(16, rescaled=True).num_params((320, 7)) == 6 * 32 * 100 + 320
    assert BOFT(4).max_rank((16, 100)) == 16
    assert BOFT(4).preserves == {"singular values"}
    assert not BOFT(4, rescaled=True).preserves


@pytest.mark.parametrize(
    ("size", "outputs", "words"),
    [
        (8, 320, "block_size 8 cannot rotate 320.*a block_size of at least 10, or this layer"),
        (8, 7, "cannot rotate 7 outputs.*it needs this layer left out"),
        (2, 12, "a block_size of at least 6, or"),
    ],
)
def test_refuses_what_has_no_butterfly(size, outputs, words):
    with pytest.raises(ValueError, match=words):
        BOFT(size).check((outputs, 8))
