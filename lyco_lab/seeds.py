"""Random streams that depend on what they are for, and on nothing drawn before them.

    generator(seed, "noise", step, rank)

gives the same numbers whether or not the run was interrupted before `step`, and whatever other
streams were drawn from. No saved state is needed to resume, and the global generator is unused.
"""

import hashlib
import json

import torch


def derive(seed: int, *stream: int | str) -> int:
    """A 63-bit seed; any change in `seed` or `stream` gives an unrelated one."""
    # JSON keeps 1 apart from "1", and ("ab", "c") apart from ("a", "bc").
    key = json.dumps([seed, *stream]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *stream: int | str) -> torch.Generator:
    """A fresh CPU generator for one stream: the same draws on every machine and device."""
    return torch.Generator().manual_seed(derive(seed, *stream))


# Multipliers of SplitMix64 (Steele et al., 2014), as the signed numbers that torch has.
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_STRIDE = -0x61C8864680B583EB


def uniforms(
    key: int | torch.Tensor, step: torch.Tensor, size: int, device: torch.device
) -> torch.Tensor:
    """`size` numbers in [0, 1) that depend on `key` and the whole number `step` alone.

    Made by hashing counters instead of advancing a generator: the same on every device, inside
    torch.compile or not, and when a checkpointed block runs a second time.
    """
    x = torch.arange(size, device=device, dtype=torch.int64) + step * _STRIDE + key
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return ((x >> 40) & 0xFFFFFF).float() / 2**24
