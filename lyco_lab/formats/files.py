"""Adapter files as a program uses them: written from what is mounted, mounted on a model, merged.

A model is a diffusers pipeline, or a mapping of its parts by the names that files have for them:
"unet" or "transformer", "text_encoder", "text_encoder_2", "text_encoder_3".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lyco_lab.adapters.mount import Mounted
from lyco_lab.errors import UserError
from lyco_lab.formats import foreign, kohya


def save(
    path: Path | str,
    mounted: Mapping[str, Mounted],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapters mounted on the parts of a model to one safetensors file.

    mounted: by part, as `{"unet": attach(pipe.unet, ...)}`.
    metadata: more lines of text for the file's header.
    dtype: of the stored factors, as torch.float16; without it they keep theirs, and every bit.

    Raises `UserError` for an unknown part, and where `path` is a file that is not of lyco_lab.
    """
    kohya.save(Path(path), mounted, metadata or {}, dtype=dtype)


def load(path: Path | str, model: Any, *, partial: bool = False) -> dict[str, Mounted]:
    """Mount the adapters in a file on a model; returns them by part.

    A file of lyco_lab comes back exactly. Of another program's file every layer that is understood
    is mounted. `partial` allows a file that adapts parts which the model does not have.

    Raises `UserError` where the file is damaged, fits no layer, or holds tensors that are not
    understood, which would be lost without a word. No adapter is then left on the model.
    """
    path = Path(path)
    mounted, report = foreign.apply(path, parts(model), partial=partial)
    unused = [line for line in report if not line.used]
    if unused and not partial:
        for part in mounted.values():
            part.detach()
        first = unused[0]
        raise UserError(
            f"{path} has {len(unused)} of {len(report)} tensors that are not used, the first is "
            f"{first.key!r}: {first.note}; partial=True leaves them out"
        )
    return mounted


def merge(mounted: Mounted | Mapping[str, Mounted], *, keep_base: bool = True) -> None:
    """Fold adapters into the weights, W + γT(A): of one part of a model, or of all of them.

    With `keep_base` the frozen weights are kept, and `Mounted.unmerge` brings back every bit of
    them; without, they are overwritten. Raises `UserError` where a layer cannot be merged: with
    `keep_base` every part is then as it was, without it those before that part are merged.
    """
    done: list[Mounted] = []
    try:
        for part in [mounted] if isinstance(mounted, Mounted) else mounted.values():
            part.merge(keep_base=keep_base)
            done.append(part)
    except UserError:
        for part in done if keep_base else ():
            part.unmerge()
        raise


def parts(model: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline or mapping that adapter files have a name for.

    Raises `UserError` where there is none.
    """
    given = model if isinstance(model, Mapping) else getattr(model, "components", None)
    if given is None:
        raise UserError(
            f"needs a diffusers pipeline or a mapping as {{'unet': module}}, got a "
            f"{type(model).__name__}"
        )
    found = {name: given[name] for name in kohya.PREFIXES if given.get(name) is not None}
    if not found:
        known, there = ", ".join(kohya.PREFIXES), ", ".join(map(str, given)) or "nothing"
        raise UserError(f"a model needs one of {known}, this one has {there}")
    return found
