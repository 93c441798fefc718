"""Digests of a model's parts as they are in memory: any change of their weights changes them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

BYTES = 16


def weights(module: nn.Module) -> bytes:
    """Of all weights, by name, and of the configuration."""
    h = hashlib.blake2b(digest_size=BYTES)
    h.update(_config(getattr(module, "config", {})).encode())
    for name, tensor in module.state_dict().items():
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(_bytes(tensor))
    return h.digest()


def tokenizer(found: Any) -> bytes:
    """Of its words, its rules and its length."""
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        rules = sorted(found.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        for last_call in ("truncation", "padding"):  # it notes how it was asked last
            rules.pop(last_call, None)
    said = [rules, found.model_max_length, found.pad_token_id]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=BYTES).digest()


def _config(config: Any) -> str:
    """Without what is noted of where a model came from."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    kept = {key: value for key, value in values.items() if not key.startswith("_")}
    kept.pop("transformers_version", None)
    return json.dumps(kept, sort_keys=True, default=str)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
