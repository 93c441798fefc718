"""The tensors of a .safetensors or .ckpt file by name, read one by one.

A .ckpt is a pickle, which can hold code: it is read as data only, and refused if there is anything
else in it.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from lyco_lab.errors import UserError

NEEDS_CODE = (
    "needs code to be unpickled, or is no checkpoint, and is not opened: a pickle can do anything"
)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file by name, read from disk one by one."""

    def __init__(
        self, names: Iterable[str], read: Callable[[str], Tensor], metadata: Mapping[str, str]
    ) -> None:
        self.names, self.read, self.metadata = dict.fromkeys(names), read, metadata

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


def safe(path: Path, name: str) -> Tensors:
    try:
        file = safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{name} is not a whole .safetensors file: {error}") from error
    return Tensors(file.keys(), file.get_tensor, file.metadata() or {})


def pickled(path: Path, name: str) -> Tensors:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            found = torch.load(path, mmap=True, **options)
        except RuntimeError:  # files older than torch 1.6 cannot be mapped
            found = torch.load(path, **options)
    except pickle.UnpicklingError as error:
        raise UserError(f"{name} {NEEDS_CODE}; use the .safetensors file of that model") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{name} is not a whole checkpoint: {first_line(error)}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise UserError(f"{name} holds a {type(found).__name__}, not tensors by their names")
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    return Tensors(tensors, tensors.__getitem__, {})


def read(path: Path, name: str) -> Tensors:
    """`name` is what errors call the file."""
    return safe(path, name) if path.suffix == ".safetensors" else pickled(path, name)


def needs_code(error: BaseException | None) -> bool:
    """Whether a file was refused for what is pickled in it, as libraries say it in other words."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__ or error.__context__
    return error is not None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
