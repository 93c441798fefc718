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
