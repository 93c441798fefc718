"""A mutated adapter file, loaded on the embedded model: it is read, or refused in one line."""

import json
import random
import struct
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lyco_lab.diffusion.model import Diffusion
from tests.trials import child, hostile, study
from tests.trials.studies import LIMIT_S, judged, row
from tests.trials.table import Kind, Row

DTYPES = (
    "BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "C64",
    "F4", "X", "", None, 3,
)  # fmt: skip
WORDS: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2.5,
    1e300,
    10**20,
    "",
    "x",
    "lora",
    [],
    {},
    [1],
    {"kind": "lora"},
)
Header = dict[str, Any]


def trial(work: Path, seed: int, number: int) -> Row:
    made = study.finished(work, "whole", study.WHOLE)
    child.warm(made.study)
    rng = random.Random(f"{seed}/adapters/{number}")
    model = _model(made.study)
    source = rng.choice(sorted(made.root.glob("*/adapter.safetensors")))
    edit = rng.choice(EDITS)
    file = work / f"adapter-{number}.safetensors"
    foreign = rng.random() < 0.5
    try:
        file.write_bytes(edit(source.read_bytes(), rng))
        ending = child.forked(lambda: _load(file, model, foreign), LIMIT_S)
    finally:
        file.unlink(missing_ok=True)
    reader = "foreign" if foreign else "kohya"
    return row(
        "adapters", number, source.parent.name, f"{edit.__name__}, {reader}", judged(ending), ending
    )


@cache
def _model(plain: Path) -> Diffusion:
    from lyco_lab.config import load_study
    from lyco_lab.diffusion.model import load, quiet
    from lyco_lab.miniature import placed

    with quiet():
        return load(placed(load_study(plain).runs[0].model))


def _load(file: Path, model: Diffusion, is_foreign: bool) -> int:
    """Mount the file and merge it, as drawing does; the command line's exit codes."""
    import typer

    from lyco_lab.cli import exit_codes
    from lyco_lab.formats import foreign, kohya

    try:
        with exit_codes(), torch.no_grad():
            applied: Any = (foreign if is_foreign else kohya).apply(file, model.parts)
            for mounted in (applied[0] if is_foreign else applied).values():
                mounted.merge()
    except typer.Exit as exit_:
        sys.stderr.flush()
        return int(exit_.exit_code)
    return 0


def _split(content: bytes) -> tuple[Header, bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _joined(header: Header, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header_length(content: bytes, rng: random.Random) -> bytes:
    """The length of the header is another number."""
    size = rng.choice((0, 1, 7, len(content), 10**8, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", size) + content[8:]


def entry(content: bytes, rng: random.Random) -> bytes:
    """A tensor has another type, shape, place or name, or is not listed."""
    header, data = _split(content)
    name = rng.choice([key for key in header if key != "__metadata__"])
    found, action = header[name], rng.randrange(6)
    if action == 0:
        found["dtype"] = rng.choice(DTYPES)
    elif action == 1:
        shapes: tuple[Any, ...] = ([], [0], [1], [-1], [2**40, 2**40], [1] * 200, "x", None, [1.5])
        found["shape"] = rng.choice((*shapes, found["shape"][::-1], [*found["shape"], 1]))
    elif action == 2:
        found["data_offsets"] = rng.choice(([0, 0], [4, 0], [0, 2**63], [-4, 0], [0], None, "x"))
    elif action == 3:
        del header[name]
    elif action == 4:
        header[rng.choice((name[:-1], "x" + name, name.upper(), "", "." + name))] = header.pop(name)
    else:
        header[name] = rng.choice(WORDS)
    return _joined(header, data)


def metadata(content: bytes, rng: random.Random) -> bytes:
    """What the file says of itself is something else."""
    header, data = _split(content)
    held = header["__metadata__"]
    key = rng.choice(list(held))
    if rng.random() < 0.2:
        held[key] = rng.choice(("", "{", "x", "null", "[]", '"x"', "1", "{}", None, 3, {}))
    else:
        held[key] = _reworded(held[key], rng)
    return _joined(header, data)


def _reworded(text: str, rng: random.Random) -> str:
    """JSON in which one thing is another."""
    try:
        read = json.loads(text)
    except ValueError:
        return text[:-1]
    nodes = hostile.nodes(read)
    if not nodes:
        return json.dumps(rng.choice(WORDS))
    holder, key = rng.choice(nodes)
    if rng.random() < 0.3 and isinstance(holder, dict):
        holder[f"{key}s"] = holder.pop(key)
    else:
        holder[key] = rng.choice(WORDS)
    return json.dumps(read)


def tensors(content: bytes, rng: random.Random) -> bytes:
    """The values of a tensor are others, or it is of another kind; the file is consistent."""
    header, _ = _split(content)
    held = safetensors.torch.load(content)
    name = rng.choice(sorted(held))
    tensor = held[name]
    values = (float("nan"), float("inf"), -float("inf"), 1e38, 1e-45, 0.0)
    others: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: torch.full_like(tensor, rng.choice(values)),
        lambda: tensor.to(rng.choice((torch.float8_e4m3fn, torch.float16, torch.bfloat16))),
        lambda: tensor.to(rng.choice((torch.int64, torch.bool, torch.uint8, torch.float64))),
        lambda: tensor.flatten(),
        lambda: tensor[:0].clone() if tensor.dim() else tensor.reshape(1),
        lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor.reshape(1, 1),
        lambda: tensor.unsqueeze(0),
    )
    held[name] = rng.choice(others)().contiguous()
    return bytes(safetensors.torch.save(held, header["__metadata__"]))


def octets(content: bytes, rng: random.Random) -> bytes:
    """Bytes are others anywhere in the file, or in its header alone."""
    (size,) = struct.unpack("<Q", content[:8])
    head = content[: 8 + size]
    return (
        hostile.octets(head, rng) + content[8 + size :]
        if rng.random() < 0.7
        else hostile.octets(content, rng)
    )


EDITS = (header_length, entry, entry, metadata, metadata, metadata, tensors, tensors, octets)
KIND = Kind("adapters", 500, trial)
