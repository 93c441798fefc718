"""Models on disk: a `Diffusion` from the path that a study names, and their fingerprint."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from lyco_lab.diffusion.base import Diffusion, Latents, Sizes, quiet
from lyco_lab.diffusion.families.sd1 import SD1
from lyco_lab.diffusion.objective import of_scheduler
from lyco_lab.errors import UserError

__all__ = ["Diffusion", "Latents", "Sizes", "fingerprint", "load"]

MEGABYTE = 2**20
NEEDED = SD1.PARTS


def fingerprint(folder: Path) -> str:
    """Eight hex digits that change with the model's weights.

    Of each weight file: name, size, and the first and last megabyte. All of a full-size model
    would take a minute to read, and another training moves these bytes too.
    """
    digest = hashlib.blake2b(digest_size=4)
    for part in NEEDED:
        for file in sorted((folder / part).glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{part}/{file.name}:{size}".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(MEGABYTE))
                opened.seek(max(0, size - MEGABYTE))
                digest.update(opened.read())
    return digest.hexdigest()


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> Diffusion:
    """The model in the diffusers folder `path`, which is never fetched from anywhere."""
    folder = Path(path)
    missing = [name for name in NEEDED if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"model.path is {str(path)!r}, which is not a folder saved by diffusers: "
            f"it has no {', '.join(missing)}"
        )
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel, CLIPTokenizer

    def part(cls: Any, name: str, **options: Any) -> Any:
        try:
            return cls.from_pretrained(folder, subfolder=name, local_files_only=True, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise UserError(
                f"cannot load {name} of model.path={str(path)!r}: {first_line}"
            ) from error

    with quiet():
        schedule = dict(DDPMScheduler.load_config(folder / "scheduler"))
        diffusion = SD1(
            tokenizer=part(CLIPTokenizer, "tokenizer"),
            # A folder may hold float16, which is too coarse to train on: always asked for by name.
            text_encoder=part(CLIPTextModel, "text_encoder", dtype=dtype),
            unet=part(UNet2DConditionModel, "unet", torch_dtype=dtype),
            vae=part(AutoencoderKL, "vae", torch_dtype=torch.float32),
            schedule=schedule,
            objective=of_scheduler(schedule, None, repr(str(path))),
            dtype=dtype,
        )
    for module in (diffusion.text_encoder, diffusion.unet, diffusion.vae):
        module.requires_grad_(False).eval()
    if not torch.cuda.is_available():
        # On a CPU the fused attention's backward pass is slower than the plain one.
        diffusion.unet.set_attn_processor(AttnProcessor())
    return diffusion
