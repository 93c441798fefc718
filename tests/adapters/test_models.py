"""Every adapter on the models that it is for, small ones of random weights.

Also gradient checkpointing, which runs a block's forward twice, dropouts and all.
"""

import copy
import functools

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.options import Options
from lyco_lab.adapters.targeting import SUPPORTED
from lyco_lab.errors import UserError
from tests.strategies import move

every_adapter = pytest.mark.parametrize("cls", ADAPTERS.values(), ids=ADAPTERS.keys())


def unet(**settings):
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8,
        norm_num_groups=4, attention_head_dim=2, **settings,
    )  # fmt: skip


def sd1():
    return unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl():
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def sd3():
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
        qk_norm="rms_norm",
    )  # fmt: skip


def flux():
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def clip():
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=12, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def call(kind, model):
    rng = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=rng)

    t = torch.tensor([900.0, 100.0])
    if kind == "sd1":
        return model(randn(2, 4, 8, 8), t, randn(2, 5, 8)).sample
    if kind == "sdxl":
        added = {"text_embeds": randn(2, 8), "time_ids": randn(2, 6)}
        return model(randn(2, 4, 8, 8), t, randn(2, 5, 8), added_cond_kwargs=added).sample
    if kind == "sd3":
        return model(randn(2, 4, 8, 8), randn(2, 5, 16), randn(2, 8), t).sample
    if kind == "flux":
        return model(
            hidden_states=randn(2, 16, 4), encoder_hidden_states=randn(2, 5, 16),
            pooled_projections=randn(2, 8), timestep=t / 1000, img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample  # fmt: skip
    return model(torch.randint(48, (2, 12), generator=rng)).last_hidden_state


MODELS = {"sd1": sd1, "sdxl": sdxl, "sd3": sd3, "flux": flux, "clip": clip}


@functools.cache
def _built(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[kind]()


def build(kind):
    return copy.deepcopy(_built(kind))


def fitting(cls, model, **fields):
    """The adapter, and every layer of the model that it can take."""
    if "rank" in cls.__dataclass_fields__:
        fields = {"rank": 2} | fields
    adapter, names = cls(**fields), []
    for name, layer in model.named_modules():
        if isinstance(layer, SUPPORTED):
            try:
                attach(copy.deepcopy(nn.ModuleDict({"x": layer})), adapter, ["x"], seed=0)
            except UserError:
                continue
            names.append(name)
    return adapter, names


@every_adapter
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_trains_merges_and_comes_back(cls, kind):
    model = build(kind).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = call(kind, model).detach()
    adapter, names = fitting(cls, model)
    if kind == "sd3" and adapter.takes == "norm":  # its norms are of diffusers, or scale nothing
        with pytest.raises(UserError, match="it is a RMSNorm, and an adapter needs one of"):
            attach(model, adapter, ["transformer_blocks.0.attn.norm_q"], seed=0)
        return
    assert len(names) > 2
    mounted = attach(model, adapter, names, seed=0)
    torch.testing.assert_close(call(kind, model), frozen, rtol=1e-4, atol=1e-4)
    move(mounted, 1, size=0.02)
    y = call(kind, model)
    assert not torch.allclose(y, frozen)
    y.square().mean().backward()
    graded = [p.grad is not None for p in mounted.parameters()]
    assert sum(graded) > 0.8 * len(graded)  # the last block of SD 3 leaves the text's end unused
    assert all(p.grad.isfinite().all() for p in mounted.parameters() if p.grad is not None)
    mounted.eval()
    adapted = call(kind, model)
    mounted.merge()
    torch.testing.assert_close(call(kind, model), adapted, rtol=1e-3, atol=1e-4)
    mounted.detach()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(call(kind, model), frozen)


def gradients(model, kind, mounted):
    mounted.step = 0
    for parameter in mounted.parameters():
        parameter.grad = None
    call(kind, model).square().mean().backward()
    return [p.grad for p in mounted.parameters()]


@every_adapter
@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_checkpointing_changes_no_gradient(cls, kind):
    """The second run of a block draws what the first drew."""
    model = build(kind).train()
    adapter, names = fitting(cls, model)
    options = Options(module_dropout=0.3)
    for more in ({"dropout": 0.3}, {"rank_dropout": 0.3}):
        richer = Options(**({"module_dropout": 0.3} | more))
        try:
            for name in names:
                layer = model.get_submodule(name)
                richer.check(adapter, tuple(layer.weight.shape), type(layer).__name__)
        except UserError:
            continue
        options = richer
    mounted = attach(model, adapter, names, seed=0, options=options)
    move(mounted, 1, size=0.02)
    plain = gradients(model, kind, mounted)
    model.enable_gradient_checkpointing()
    for gradient, want in zip(gradients(model, kind, mounted), plain, strict=True):
        assert (gradient is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-6)
