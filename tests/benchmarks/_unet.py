"""Stable Diffusion 1.5's UNet with random weights, and what it is called with."""

import torch
from torch import Tensor, nn

LIMIT_GB = 13  # of data; a contestant that needs more fails, and not the machine

# Not put on all of it.
LEFT_OUT = {
    "native": "left out: as large as the model itself, which AdamW makes four times",
    "tlora": "left out: it starts from a singular value decomposition of every weight",
}


def make(device: str = "cpu", *, small: bool = False) -> nn.Module:
    """860 million parameters by configuration; `small`: the same kinds of layers, fewer of them."""
    from diffusers import UNet2DConditionModel

    settings = {"block_out_channels": (320, 640, 1280, 1280)}
    if small:
        settings = {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    with torch.device("meta"):  # to draw them once, not twice
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, **settings
        )
    unet.to_empty(device=device)
    rng = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.uniform_(-0.02, 0.02, generator=rng)
    return unet.requires_grad_(False)


def inputs(side: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Latents, of which the gradient is wanted, a timestep, and a prompt's embedding."""
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, side, side, generator=rng).to(device).requires_grad_()
    prompt = torch.randn(1, 77, 768, generator=rng).to(device)
    return latents, torch.tensor([500], device=device), prompt
