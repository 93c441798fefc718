"""What a model on disk is asked for, wherever its parts lie."""

import abc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lyco_lab.config import Model
from lyco_lab.errors import UserError


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
