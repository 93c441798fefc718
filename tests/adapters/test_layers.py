"""Layers that are not simply torch's linear ones: attention, lookups, what can only be called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.options import Options
from tests.strategies import move

MATRICES = {name: cls for name, cls in ADAPTERS.items() if cls.takes == "matrix"}
on_matrices = pytest.mark.parametrize("cls", MATRICES.values(), ids=MATRICES.keys())


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


# Attention.


class Attending(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.attn = nn.MultiheadAttention(8, 2, dtype=torch.float64, **settings)
            for name, parameter in self.attn.named_parameters():
                if "bias" in name:  # biases start at zero
                    nn.init.normal_(parameter)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


BOTH = ["attn", "attn.out_proj"]
CALLS = {
    "self": ({}, lambda x, m: ((x, x, x), {})),
    "batch first": ({"batch_first": True}, lambda x, m: ((x, x, x), {})),
    "cross": ({}, lambda x, m: ((x, m, m), {"need_weights": False})),
    "three inputs": ({}, lambda x, m: ((x, m, 2 * m), {"average_attn_weights": False})),
    "no biases": ({"bias": False}, lambda x, m: ((x, x, x), {})),
    "added keys": (
        {"add_bias_kv": True, "add_zero_attn": True},
        lambda x, m: (
            (x, m, m),
            {
                "attn_mask": torch.ones(len(x), len(m)).tril().logical_not(),
                "key_padding_mask": torch.tensor([[False] * 5 + [True]] * x.shape[1]),
            },
        ),
    ),
    "a mask for each head": (
        {"batch_first": True},
        lambda x, m: ((x, x, x), {"attn_mask": randn(len(x) * 2, x.shape[1], x.shape[1], seed=5)}),
    ),
    "causal": (
        {},
        lambda x, m: (
            (x, x, x),
            {
                "attn_mask": nn.Transformer.generate_square_subsequent_mask(
                    len(x), dtype=torch.float64
                ),
                "is_causal": True,
                "need_weights": False,
            },
        ),
    ),
    "unbatched": ({}, lambda x, m: ((x[:, 0], m[:, 0], m[:, 0]), {})),
}


@pytest.mark.parametrize("targets", [["attn"], ["attn.out_proj"], BOTH], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_attention_is_torchs_with_the_adapted_weights(call, targets):
    """Values, attention and all gradients, in training and in evaluation."""
    settings, arguments = CALLS[call]
    model, x, m = Attending(**settings), randn(4, 3, 8).requires_grad_(), randn(6, 3, 8, seed=1)
    mounted = attach(model, Native(bias=True), targets, seed=0)
    move(mounted, 3)
    plain = Attending(**settings)
    state = dict(plain.named_parameters())
    for name in targets:
        keys = ("in_proj_weight", "in_proj_bias") if name == "attn" else ("weight", "bias")
        factors = mounted.factors(name)
        state[f"{name}.{keys[0]}"] = state[f"{name}.{keys[0]}"] + factors["diff"]
        if settings.get("bias", True):
            state[f"{name}.{keys[1]}"] = state[f"{name}.{keys[1]}"] + factors["bias"]
    args, kwargs = arguments(x, m)
    for net in (model, plain):
        net.train()
    y, attention = model(*args, **kwargs)
    expected, wanted = torch.func.functional_call(plain, state, args, kwargs)
    torch.testing.assert_close(y, expected)
    assert (attention is None) == (wanted is None)
    if wanted is not None:
        torch.testing.assert_close(attention, wanted)
    inputs = [x, *mounted.parameters()]
    direction = randn(*y.shape, seed=7)
    got = torch.autograd.grad((y * direction).sum(), inputs)
    for gradient, want in zip(
        got, torch.autograd.grad((expected * direction).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(gradient, want)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(*args, **kwargs)[0], expected)
    mounted.merge()
    assert type(model.attn) is nn.MultiheadAttention
    torch.testing.assert_close(model(*args, **kwargs)[0], expected)
    mounted.detach()
    fresh = Attending(**settings)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())
    assert type(model.attn.out_proj) is type(fresh.attn.out_proj)


@on_matrices
def test_every_adapter_takes_attention(cls):
    model, x = Attending(batch_first=True), randn(2, 4, 8)
    frozen = model(x, x, x)[0]
    mounted = attach(model, cls(**small(cls)), BOTH, seed=0)
    torch.testing.assert_close(model(x, x, x)[0], frozen)
    move(mounted, 1)
    y = model(x, x, x)[0]
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mounted.parameters())
    mounted.merge()
    torch.testing.assert_close(model(x, x, x)[0], y)


def test_two_attachments_share_an_attention():
    model, x = Attending(batch_first=True).requires_grad_(False), randn(2, 4, 8)
    frozen = model(x, x, x)[0]
    outer = attach(model, LoRA(rank=2), ["attn.out_proj"], seed=0)
    inner = attach(model, LoRA(rank=2), ["attn"], seed=0)
    move(outer, 1), move(inner, 2)
    both = model(x, x, x)[0]
    inner.detach()
    with outer.disabled():
        torch.testing.assert_close(model(x, x, x)[0], frozen)
    assert not torch.allclose(model(x, x, x)[0], frozen)
    assert not torch.allclose(model(x, x, x)[0], both)
    outer.detach()
    assert type(model.attn) is nn.MultiheadAttention
    assert torch.equal(model(x, x, x)[0], frozen)


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_attention_in_half_precision_keeps_a_small_change(mode):
    """With W = 0 the values are all of the adapter's; rounded into W they would be none."""
    model = Attending(batch_first=True).float()
    with torch.no_grad():
        model.attn.in_proj_weight[:16].zero_()  # equal scores: the mean of the values
        model.attn.in_proj_weight[16:].copy_(torch.cat([torch.eye(8)[:, :4]] * 2, 1))
        model.attn.in_proj_bias.zero_()
        model.attn.out_proj.weight.copy_(torch.eye(8))
        model.attn.out_proj.bias.zero_()
    half = torch.randn(2, 1, 4, generator=rng(0))
    x = torch.cat([half, -half], -1)  # which the frozen weight maps to zero
    if mode == "bfloat16":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    mounted = attach(model, Native(), ["attn"], seed=0)
    move(mounted, 1, size=3e-4)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y = model(x, x, x)[0].float()
    expected = F.linear(x.float(), mounted.delta("attn")[16:])
    assert (y - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("targets", ["layers.*.self_attn", "layers.*.linear?", "*.out_proj"])
def test_an_encoder_of_torch_does_not_pass_its_adapters_by(targets):
    """Its fast path in evaluation reads weights, and calls no layer."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8, generator=rng(0))
    mounted = attach(model, Native(), [targets], seed=0)
    move(mounted, 1)
    adapted = model(x)  # gradients are asked for, so not on the fast path
    with torch.no_grad():
        torch.testing.assert_close(model(x), adapted)
        mounted.merge()
        torch.testing.assert_close(model(x), adapted)


def test_attention_refuses_what_it_cannot_do():
    model = Attending(kdim=6)
    with pytest.raises(ValueError, match=r"kdim 6 or vdim 8.*no in_proj_weight.*out_proj can be"):
        attach(model, LoRA(rank=2), ["attn"], seed=0)
    attach(model, LoRA(rank=2), ["attn.out_proj"], seed=0)
    x, m = randn(4, 3, 8), randn(5, 3, 6)
    torch.testing.assert_close(
        model(x, m, randn(5, 3, 8))[0], Attending(kdim=6)(x, m, randn(5, 3, 8))[0]
    )
    with pytest.raises(ValueError, match="give the mask as attn_mask"):
        model(x, m, randn(5, 3, 8), is_causal=True)

    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="a Own has a forward of its own"):
        attach(nn.Sequential(Own(8, 2)), LoRA(), ["0"], seed=0)


def small(cls):
    """Fields for layers as small as these."""
    return {"rank": 2} if "rank" in cls.__dataclass_fields__ else {}


# Embeddings.


@on_matrices
def test_an_embedding_looks_up_the_adapted_weight(cls):
    """Values and gradients, the padding's row included, against autograd through F.embedding."""
    table = nn.Embedding(12, 8, padding_idx=3, dtype=torch.float64)
    x = torch.tensor([[1, 3, 1], [0, 11, 3]])
    model = nn.Sequential(table)
    adapter = cls(**small(cls))
    mounted = attach(model, adapter, ["0"], seed=0)
    move(mounted, 1)
    direction = randn(2, 3, 8, seed=2)
    factors = mounted.factors("0")
    expected = F.embedding(x, adapter.adapted(table.weight, factors), padding_idx=3)
    trained = mounted.parameters()
    got = torch.autograd.grad((model(x) * direction).sum(), trained)
    torch.testing.assert_close(model(x), expected)
    for gradient, want in zip(
        got, torch.autograd.grad((expected * direction).sum(), trained), strict=True
    ):
        torch.testing.assert_close(gradient, want)


def test_an_embedding_keeps_nothing_of_its_size():
    model, x = nn.Sequential(nn.Embedding(1000, 8)), torch.tensor([1, 2])
    attach(model, LoRA(rank=2), ["0"], seed=0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    sizes = [t.numel() for t in kept if t.data_ptr() != model[0].weight.data_ptr()]
    assert sizes and max(sizes) <= 1000 * 2


# Layers that can only be called.


class Int8Linear(nn.Module):
    """As quantising libraries have them: whole numbers and a scale, and a forward of its own."""

    def __init__(self, inputs, outputs, bias=True, dtype=torch.float64):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer(
            "weight",
            torch.randint(-127, 128, (outputs, inputs), generator=rng(0), dtype=torch.int8),
        )
        self.register_buffer(
            "scale", (0.01 + 0.01 * torch.rand(outputs, 1, generator=rng(1))).to(dtype)
        )
        self.register_buffer(
            "bias", torch.randn(outputs, generator=rng(2)).to(dtype) if bias else None
        )

    def full(self):
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return F.linear(x, self.full().to(x.dtype), self.bias)


class OwnForward(nn.Linear):
    """A subclass that does more than its parent, as libraries have them too."""

    def full(self):
        return 2 * self.weight.detach()

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def opaque_layers():
    torch.manual_seed(0)
    return {
        "int8": Int8Linear(8, 12),
        "int8 without bias": Int8Linear(8, 12, bias=False),
        "own forward": OwnForward(8, 12, dtype=torch.float64),
    }


UNREADING = {name: cls for name, cls in MATRICES.items() if not cls.reads_weight}
READING = {name: cls for name, cls in MATRICES.items() if cls.reads_weight}


def test_which_adapters_only_multiply_by_the_weight():
    only = {"lora", "loha", "lokr", "dylora", "native", "glora", "ia3", "oft", "boft"}
    assert UNREADING.keys() >= only & MATRICES.keys()


@pytest.mark.parametrize("kind", opaque_layers())
@pytest.mark.parametrize("cls", UNREADING.values(), ids=UNREADING.keys())
def test_a_layer_that_can_only_be_called_is_adapted(cls, kind):
    """Against the layer with the adapted weight, written out; the input's gradient as well."""
    layer, x = opaque_layers()[kind], randn(2, 5, 8).requires_grad_()
    weight, bias = layer.full(), layer.bias
    model = nn.Sequential(layer)
    frozen = model(x)
    adapter = cls(**small(cls))
    mounted = attach(model, adapter, ["0"], seed=0)
    torch.testing.assert_close(model(x), frozen)
    move(mounted, 1)
    expected = F.linear(x, adapter.adapted(weight, mounted.factors("0")), bias)
    y, inputs = model(x), [x, *mounted.parameters()]
    torch.testing.assert_close(y, expected)
    direction = randn(*y.shape, seed=2)
    got = torch.autograd.grad((y * direction).sum(), inputs)
    for gradient, want in zip(
        got, torch.autograd.grad((expected * direction).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(gradient, want)
    if adapter.uses_base:
        with pytest.raises(ValueError, match="weight of the layer '0', a .*, cannot be read"):
            mounted.norms()
    else:
        norm = adapter.delta(weight, mounted.factors("0")).norm().item()
        assert mounted.norms()["0"] == pytest.approx(norm, rel=1e-12)
    with pytest.raises(ValueError, match="cannot merge: the weight of layer '0'"):
        mounted.merge()
    mounted.detach()
    assert type(layer) is type(opaque_layers()[kind])
    assert torch.equal(model(x), frozen)


@pytest.mark.parametrize("cls", READING.values(), ids=READING.keys())
def test_an_adapter_that_reads_the_weight_is_refused(cls):
    with pytest.raises(ValueError, match="Int8Linear, whose weight cannot be read"):
        attach(nn.Sequential(Int8Linear(8, 12)), cls(), ["0"], seed=0)


def test_a_bias_that_cannot_be_moved_is_refused():
    with pytest.raises(ValueError, match="the bias of a Int8Linear cannot be moved"):
        attach(nn.Sequential(Int8Linear(8, 12)), Native(bias=True), ["0"], seed=0)


def test_dropouts_act_on_a_layer_that_can_only_be_called():
    model, x = nn.Sequential(Int8Linear(8, 12)), randn(64, 8)
    frozen = model(x)
    options = Options(dropout=0.5, rank_dropout=0.5, module_dropout=0.5)
    mounted = attach(model, LoRA(rank=4), ["0"], seed=0, options=options)
    move(mounted, 1)
    seen = torch.stack([model(x) - frozen for _ in range(20)])
    assert seen.std(0).mean() > 0
    mounted.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.filterwarnings("ignore:.*quantiz.*deprecated")
def test_the_quantised_linear_of_torch_is_adapted():
    """It has no parameters at all; torch gives no gradient of its input, the factors get theirs."""
    plain = nn.Sequential(nn.Linear(8, 12))
    model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, torch.qint8)
    x = torch.randn(5, 8, generator=rng(0))
    frozen = model(x)
    mounted = attach(model, LoRA(rank=2), ["0"], seed=0)
    move(mounted, 1)
    y = model(x)
    torch.testing.assert_close(y, frozen + F.linear(x, mounted.delta("0")))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mounted.parameters())
    mounted.detach()
    assert torch.equal(model(x), frozen)
