"""A token's vectors in a .safetensors file, as web interfaces and diffusers read them.

    one text encoder       emb_params (1, D)
    several                clip_l, clip_g, t5xxl

The token itself is the file's name.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from lyco_lab.errors import UserError
from lyco_lab.files import atomic
from lyco_lab.readers import Damaged, read_safetensors

ALONE = "emb_params"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


def save(path: Path, vectors: Mapping[str, Tensor]) -> None:
    """`vectors`: of each text encoder, (1, D)."""
    keys = {name: ALONE if len(vectors) == 1 else KEYS[name] for name in vectors}
    tensors = {
        keys[name]: v.detach().cpu().to(torch.float32, copy=True) for name, v in vectors.items()
    }
    data = safetensors.torch.save(tensors)
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def load(path: Path) -> dict[str, Tensor]:
    """The vectors by text encoder."""
    tensors, _ = read_safetensors(Path(path))
    names = {key: name for name, key in KEYS.items()} | {ALONE: "text_encoder"}
    if not tensors or not tensors.keys() <= names.keys():
        known = ", ".join(names)
        raise UserError(f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}, needs {known}")
    for key, vectors in tensors.items():
        if vectors.dtype not in DTYPES or vectors.dim() != 2 or not torch.isfinite(vectors).all():
            raise Damaged(
                path,
                f"{key} is of {vectors.dtype} and shape {tuple(vectors.shape)}, and finite "
                "floating-point numbers of shape (vectors, width) are needed",
            )
    return {names[key]: tensor for key, tensor in tensors.items()}
