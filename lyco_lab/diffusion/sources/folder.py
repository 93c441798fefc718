"""Models laid out as diffusers' folders."""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lyco_lab.config import Model
from lyco_lab.diffusion.sources.base import Source, check_choice
from lyco_lab.diffusion.tensors import NEEDS_CODE, first_line, needs_code
from lyco_lab.errors import UserError

VARIANT = re.compile(r"[\w-]+\.(?P<variant>[a-z_0-9]+)(-\d+-of-\d+)?\.(safetensors|bin)")
NON_EMA = "non_ema"
DENOISERS = ("unet", "transformer")
WEIGHTS = (".safetensors", ".bin")


class Folder(Source):
    """A diffusers folder."""

    def __init__(self, model: Model, folder: Path) -> None:
        super().__init__(model)
        self.folder = folder
        if model.tokenizer is not None:
            raise UserError(
                f"model.tokenizer is {model.tokenizer!r}, but {self.name} is a folder with "
                "a tokenizer of its own: leave it null"
            )
        for part in DENOISERS:
            if (folder / part).is_dir():
                self.variant(part)

    @property
    def configs(self) -> Path:
        return self.folder

    def files(self, parts: Iterable[str]) -> dict[str, Path]:
        return {
            f"{part}/{file.name}": file
            for part in sorted(parts)
            for file in _weights(self.folder / part)
        }

    def missing(self, parts: Iterable[str]) -> list[str]:
        return [part for part in parts if not self.has(part)]

    @property
    def prediction(self) -> None:
        return None

    def network(self, cls: Any, part: str, dtype: torch.dtype) -> nn.Module:
        # A folder may hold float16, which is too coarse to train on: always asked for by name.
        asked = {"torch_dtype" if hasattr(cls, "from_config") else "dtype": dtype}
        made: nn.Module = self._load(cls, part, **asked, variant=self.variant(part))
        return made

    def tokenizer(self, cls: Any, part: str, pad: str | None) -> Any:
        return self._load(cls, part)

    def _load(self, cls: Any, part: str, **options: Any) -> Any:
        try:
            return cls.from_pretrained(
                self.folder, subfolder=part, local_files_only=True, **options
            )
        except (
            OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError,
        ) as error:  # fmt: skip
            why = first_line(error)
            if needs_code(error):
                why = f"its file of weights {NEEDS_CODE}; use the .safetensors file of that model"
            raise UserError(f"cannot load {part} of {self.name}: {why}") from error

    def variant(self, part: str) -> str | None:
        """Which of a part's files to read: `model.fp16.safetensors` are the variant "fp16"."""
        matches = [VARIANT.fullmatch(file.name) for file in _weights(self.folder / part)]
        variants = {match["variant"] if match else None for match in matches}
        if part in DENOISERS:
            both, chosen = {NON_EMA} < variants, self.model.weights
            check_choice(self, both, chosen)
            if chosen == "non-ema":
                return NON_EMA
        usual = variants - {NON_EMA} or variants
        return None if None in usual or not usual else min(map(str, usual))


def _weights(part: Path) -> list[Path]:
    """A part's files with weights: in safetensors, where there are any."""
    files = sorted(part.glob("*")) if part.is_dir() else []
    for suffix in WEIGHTS:
        found = [file for file in files if file.suffix == suffix]
        if found:
            return found
    return []
