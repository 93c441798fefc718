"""Random models, a few thousand weights each, in the genuine layouts of the families."""

from pathlib import Path
from typing import Any

import torch

SIDE = 64
CLIP = {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def save(family: str, folder: Path, tokenizer: Any, **more: Any) -> Path:
    """`family`: sd1, sd2, sd2-base, sdxl, sd3, or sd3-t5; a pipeline's folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = MAKERS[family](tokenizer, **more)
        for name in ("unet", "text_encoder", "text_encoder_2", "transformer"):
            module = getattr(pipeline, name, None)
            if module is not None:
                spread(module)
    pipeline.save_pretrained(folder)
    return folder


def spread(module: torch.nn.Module) -> None:
    """Random biases and norms: where all are 0 or 1, to mix them up would change nothing."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.05 * torch.randn(parameter.shape)
        if name.endswith("proj_out.weight"):
            parameter.data += 0.05 * torch.randn(parameter.shape)


def clip(tokenizer: Any, cls: str = "CLIPTextModel", width: int = 32, **config: Any) -> Any:
    import transformers

    return getattr(transformers, cls)(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            projection_dim=width,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **CLIP | config,
        )
    )


def vae(channels: int = 4, **config: Any) -> Any:
    from diffusers import AutoencoderKL

    made = AutoencoderKL(
        sample_size=SIDE,
        latent_channels=channels,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        **config,
    )
    spread(made)
    return made


def unet(width: int, **config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        norm_num_groups=8,
        cross_attention_dim=width,
        **{
            "block_out_channels": (16, 24, 24),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 2,
            "attention_head_dim": 4,
        }
        | config,
    )


def plain(tokenizer: Any, unet: Any, text_encoder: Any, **schedule: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae(scaling_factor=0.2),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE | schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd1(tokenizer: Any, **schedule: Any) -> Any:
    return plain(tokenizer, unet(32), clip(tokenizer), **schedule)


def sd2(tokenizer: Any, **schedule: Any) -> Any:
    linear = {"use_linear_projection": True, "attention_head_dim": (4, 6, 6)}
    encoder = clip(tokenizer, hidden_act="gelu")
    return plain(
        tokenizer, unet(32, **linear), encoder, **{"prediction_type": "v_prediction"} | schedule
    )


def sdxl(tokenizer: Any, empty_is_zero: bool = True, **schedule: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    denoiser = unet(
        32 + 24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(4, 6, 6),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13),
        text_encoder=clip(tokenizer),
        text_encoder_2=clip(tokenizer, "CLIPTextModelWithProjection", 24, hidden_act="gelu"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=denoiser,
        scheduler=DDIMScheduler(**SCHEDULE | schedule),
        force_zeros_for_empty_prompt=empty_is_zero,
        add_watermarker=False,
    )


def sd3(tokenizer: Any, t5: tuple[Any, Any] = (None, None), **schedule: Any) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIDE // 4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=32 + 24,
            pos_embed_max_size=SIDE // 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | schedule),
        vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(tokenizer, "CLIPTextModelWithProjection"),
        text_encoder_2=clip(tokenizer, "CLIPTextModelWithProjection", 24, hidden_act="gelu"),
        text_encoder_3=t5[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5[0],
    )


def sd3_t5(tokenizer: Any, **schedule: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    letters = {letter: i for i, letter in enumerate("</_abcdefghijklmnopqrstuvwxyz ,")}
    words = Tokenizer(models.WordLevel(letters, unk_token="_"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<", eos_token="/", unk_token="_", model_max_length=512
    )
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(letters),
            d_model=64,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    return sd3(tokenizer, (fast, encoder), **schedule)


MAKERS = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "sd3-t5": sd3_t5}
