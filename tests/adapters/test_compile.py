"""torch.compile sees through adapted layers whole, in training, and computes what they compute."""

import pytest
import torch
from torch import nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.options import Options
from lyco_lab.errors import UserError
from tests.strategies import move

# torch.compile makes one itself, to trace its methods.
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated")
MASKED = {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3, "use_scalar": True}
QUICK = ("lora", "lokr", "oft")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        x = torch.nn.functional.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.last(x + self.attn(x, x, x, need_weights=False)[0])


def mounted_block(cls, **wanted):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Block(), torch.randn(2, 8, 4, 5)
    adapter = cls(**({"rank": 2} if "rank" in cls.__dataclass_fields__ else {}))
    names = ["norm"] if adapter.takes == "norm" else ["conv", "last", "attn", "attn.out_proj"]
    options = {}
    for name, value in wanted.items():  # those that it has a use for
        try:
            for layer in names:
                kind = model.get_submodule(layer)
                weight = kind.in_proj_weight if layer == "attn" else kind.weight
                Options(**{name: value}).check(adapter, tuple(weight.shape), type(kind).__name__)
            options[name] = value
        except UserError:
            continue
    mounted = attach(model, adapter, names, seed=0, options=Options(**options))
    move(mounted, 1, size=0.1)
    return model, mounted, x


def step(model, mounted, x):
    x = x.clone().requires_grad_()
    y = model(x)
    return y, torch.autograd.grad(y.square().sum(), [x, *mounted.parameters()])


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [pytest.param(kind, {}, id=f"{kind}-plain") for kind in QUICK]
    + [
        pytest.param(kind, MASKED, id=f"{kind}-dropouts", marks=pytest.mark.slow)
        for kind in ADAPTERS
    ],
)
def test_a_compiled_model_is_the_model(kind, wanted):
    torch.compiler.reset()
    cls = ADAPTERS[kind]
    model, mounted, x = mounted_block(cls, **wanted)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second step draws anew
        before = mounted.step
        y, gradients = step(compiled, mounted, x)
        after, mounted.step = mounted.step, before
        expected, wants = step(model, mounted, x)
        assert mounted.step == after
        torch.testing.assert_close(y, expected)
        for gradient, want in zip(gradients, wants, strict=True):
            torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_the_default_compiler_takes_it():
    torch.compiler.reset()
    model, mounted, x = mounted_block(ADAPTERS["lora"], rank_dropout=0.3)
    y, gradients = step(torch.compile(model, fullgraph=True), mounted, x)
    mounted.step = 0
    expected, wants = step(model, mounted, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for gradient, want in zip(gradients, wants, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("kind", ["lora", "loha", "oft"])
def test_an_adapted_unet_compiles_whole(kind):
    """Stable Diffusion's own, small, with an adapter on each linear layer and convolution."""
    from diffusers import UNet2DConditionModel

    torch.compiler.reset()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=8,
            norm_num_groups=4,
            attention_head_dim=2,
        )
        x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8)
    cls = ADAPTERS[kind]
    adapter = cls(**({"rank": 2} if "rank" in cls.__dataclass_fields__ else {}))
    options = Options(module_dropout=0.2) if kind == "lora" else Options()
    names = ["*.attn?.to_*", "*.ff.net.*", "*.resnets.?.conv?"]
    mounted = attach(unet, adapter, names, seed=0, options=options)
    move(mounted, 1, size=0.05)
    time = torch.tensor([500])

    def gradients(model):
        mounted.step = 0
        y = model(x, time, text, return_dict=False)[0]
        return [y, *torch.autograd.grad(y.square().sum(), mounted.parameters())]

    compiled = gradients(torch.compile(unet, fullgraph=True, backend="aot_eager"))
    for one, other in zip(compiled, gradients(unet), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()
