"""Where a model's parts come from: a folder laid out as diffusers' own, found or fetched before.

    folder                      model_index.json, unet/, vae/, text_encoder/, …
    file.safetensors, .ckpt     all networks in one file (single_file.py)
    owner/name                  a folder in the local cache of the Hugging Face hub

Nothing is ever fetched: what is missing is an error that gives the command.
"""

import abc
import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lyco_lab.config import Model
from lyco_lab.diffusion.tensors import NEEDS_CODE, first_line, needs_code
from lyco_lab.errors import UserError

HUB = re.compile(r"[\w.-]+/[\w.-]+")
VARIANT = re.compile(r"[\w-]+\.(?P<variant>[a-z_0-9]+)(-\d+-of-\d+)?\.(safetensors|bin)")
NON_EMA = "non_ema"
DENOISERS = ("unet", "transformer")
WEIGHTS = (".safetensors", ".bin")
FETCHED = (  # of a repository on the hub, what is used
    *("*.json", "*.txt", "tokenizer*/*"),
    *(f"{part}/*.safetensors" for part in ("unet", "transformer", "vae", "text_encoder*")),
)


class Source(abc.ABC):
    """A model as it lies on disk."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def name(self) -> str:
        """As errors call it."""
        return f"model.path={self.model.path!r}"

    @property
    @abc.abstractmethod
    def configs(self) -> Path:
        """The folder with a folder for each part, in which its configuration is."""

    @abc.abstractmethod
    def files(self, parts: Iterable[str]) -> dict[str, Path]:
        """The files with the parts' weights, by what to call them whatever folder they are in."""

    @abc.abstractmethod
    def missing(self, parts: Iterable[str]) -> list[str]:
        """The parts that are not there."""

    @abc.abstractmethod
    def network(self, cls: type, part: str, dtype: torch.dtype) -> nn.Module:
        """A part with its weights, which are `dtype` whatever the files have."""

    @abc.abstractmethod
    def tokenizer(self, cls: Any, part: str, pad: str | None) -> Any:
        """`pad` is the token that fills up short texts, unless the files say so themselves."""

    @property
    @abc.abstractmethod
    def prediction(self) -> str | None:
        """What the denoiser predicts, where its schedule's configuration does not say so."""

    def has(self, part: str) -> bool:
        return (self.configs / part).is_dir()

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """A part's configuration."""
        path = self.configs / part / file
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.name} has no {part}/{file}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name}: cannot read {part}/{file}: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.name}: {part}/{file} is not a configuration")
        return found

    def index(self) -> dict[str, Any]:
        """What is said of the model as a whole; {} where nothing is."""
        name = "model_index.json"
        return self.config(".", name) if (self.configs / name).is_file() else {}

    def schedule(self) -> dict[str, Any]:
        return self.config("scheduler", "scheduler_config.json")

    def skeleton(self, cls: Any, part: str) -> nn.Module:
        """A part on the meta device: shapes without numbers."""
        config = self.config(part)
        with torch.device("meta"):
            if hasattr(cls, "from_config"):  # diffusers
                made: nn.Module = cls.from_config(config)
            else:
                made = cls(cls.config_class.from_dict(config))
        return made


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


def check_choice(source: Source, both: bool, chosen: str | None) -> None:
    """Of two sets of weights one has to be chosen, of one none can be."""
    if both and chosen is None:
        raise UserError(
            f"{source.name} has two sets of weights, those that were trained and their average: "
            "choose model.weights=non-ema or model.weights=ema"
        )
    if chosen is not None and not both:
        raise UserError(
            f"model.weights is {chosen!r}, but {source.name} has one set of weights: leave it null"
        )


def _weights(part: Path) -> list[Path]:
    """A part's files with weights: in safetensors, where there are any."""
    files = sorted(part.glob("*")) if part.is_dir() else []
    for suffix in WEIGHTS:
        found = [file for file in files if file.suffix == suffix]
        if found:
            return found
    return []


def find(model: Model) -> Source:
    """What `model.path` means."""
    path = Path(model.path).expanduser()
    if path.is_dir():
        return Folder(model, path)
    if path.suffix in (".safetensors", ".ckpt"):
        from lyco_lab.diffusion.single_file import SingleFile

        return SingleFile(model, path)
    if path.is_file():
        raise UserError(f"model.path is {model.path!r}: a file has to be a .safetensors or a .ckpt")
    if HUB.fullmatch(model.path):
        return Folder(model, cached(model.path))
    raise UserError(f"model.path is {model.path!r}, which does not exist")


def cached(name: str, fetched: tuple[str, ...] = FETCHED, setting: str = "model.path") -> Path:
    """The folder of a repository of the hub, if it was fetched before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        patterns = " ".join(f"--include {pattern!r}" for pattern in fetched)
        raise UserError(
            f"{setting} is {name!r}, which is neither here nor in the hub's local cache; "
            f"fetch it with: hf download {name} {patterns}"
        ) from None
