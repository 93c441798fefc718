"""Read back what W&B wrote offline.

A .wandb file is a header of 7 bytes, then a LevelDB log: blocks of 32 KiB filled with chunks

    checksum (4 bytes) · length (2 bytes, little endian) · kind (1 byte) · data

where kinds 1, 2, 3, 4 are a whole record, its first, middle and last part.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, CHUNK_HEADER = 32 * 1024, 7, 7


@dataclass
class Offline:
    """One offline folder's contents."""

    run: Any = None  # the run record: id, project, group, job type, tags
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    finished: bool = False


def offline_runs(folder: Path) -> list[Offline]:
    """Every offline run under `folder`, in the order they were started."""
    files = sorted(folder.rglob("run-*.wandb"), key=lambda file: file.parent.name)
    runs = [finished(file) for file in files]
    return sorted(runs, key=lambda offline: offline.run.start_time.ToNanoseconds())


def finished(file: Path, patience_s: float = 10.0) -> Offline:
    """`finish` returns a little before W&B's own process has written the last of it."""
    give_up_s = time.monotonic() + patience_s
    while not (offline := read(file)).finished and time.monotonic() < give_up_s:
        time.sleep(0.02)
    assert offline.finished, f"{file} was not finished within {patience_s} s"
    return offline


def read(file: Path) -> Offline:
    found = Offline()
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
                found.config |= _items(record.run.config.update)
            case "config":
                found.config |= _items(record.config.update)
            case "history":
                found.history.append(_items(record.history.item))
            case "summary":
                found.summary |= _items(record.summary.update)
            case "artifact":
                found.artifacts.append(record.artifact)
            case "metric":
                found.metrics.append(record.metric)
            case "exit":
                found.finished = True
    return found


def records(raw: bytes):
    assert raw[:4] == b":W&B"
    at, parts = FILE_HEADER, []
    while at + CHUNK_HEADER <= len(raw):
        left = BLOCK - at % BLOCK
        if left < CHUNK_HEADER:  # too little for a chunk: padding
            at += left
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        parts.append(raw[at + CHUNK_HEADER : at + CHUNK_HEADER + length])
        at += CHUNK_HEADER + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def _items(items: Any) -> dict[str, Any]:
    """A list of keys, single or nested, and JSON values, as nested dicts."""
    found: dict[str, Any] = {}
    for item in items:
        *parents, last = item.nested_key or [item.key]
        here = found
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = json.loads(item.value_json)
    return found
