"""What the benchmarks measure with: times, what autograd keeps, processes of their own.

Times are those of the processor (`time.process_time`), which other work on the machine moves less
than the clock on the wall; on a GPU they are those between two CUDA events. What autograd keeps is
counted by storage, so two views of one tensor count once, and a parameter not at all.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MB = 2**20
REPORT = Path(__file__).parents[2] / "docs" / "benchmarks.md"

# Freed memory is kept, as an allocator of GPU memory does. By default glibc gives large blocks
# back at once, and every temporary of a weight's size is paid again in page faults.
KEEP_FREED = {
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def isolated(
    script: str,
    task: Mapping[str, Any],
    *,
    env: Mapping[str, str] | None = None,
    minutes: float | None = None,
) -> Any:
    """What `script`, run again in a process of its own, answers to `task`; see `answer`.

    A process that dies, or takes longer than `minutes`, answers {"error": why}.
    """
    try:
        done = subprocess.run(
            [sys.executable, script, "--task", json.dumps(task)],
            env=os.environ | {"PYTHONWARNINGS": "ignore"} | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=None if minutes is None else 60 * minutes,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {minutes:g} minutes"}
    if done.returncode:
        words = done.stderr.strip().splitlines()
        return {"error": words[-1][:200] if words else f"ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def answer(perform: Callable[[Any], Any]) -> bool:
    """Perform the task given by `isolated`, if this is such a process."""
    if sys.argv[1:2] != ["--task"]:
        return False
    import logging
    import warnings

    warnings.filterwarnings("ignore")  # the peers' own, once a layer
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(json.dumps(perform(json.loads(sys.argv[2]))))
    return True


def timed(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that one call takes."""
    if device == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """The seconds of every call in every round; a round makes each of them once."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, device))
    return times


def ratio(times: Iterable[float], to: Iterable[float]) -> float:
    """The median over rounds of one time to the other's in the same round."""
    return statistics.median(a / b for a, b in zip(times, to, strict=True))


@dataclass(frozen=True)
class Kept:
    """What autograd keeps for the backward pass of one call."""

    bytes: int  # without the parameters, the call's input and its output
    largest: int  # the bytes of the largest tensor among those
    input: bool
    output: bool


@contextlib.contextmanager
def recorded(parameters: Iterable[Tensor]) -> Iterator[dict[int, Tensor]]:
    """Address -> a tensor of each storage that autograd keeps, but for the parameters'."""
    skipped = {address(tensor) for tensor in parameters}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        if address(tensor) and address(tensor) not in skipped:
            kept[address(tensor)] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def kept(call: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor]) -> Kept:
    """What autograd keeps of `call(x)`."""
    with recorded(parameters) as found:
        y = call(x)
    given = found.pop(address(x), None) is not None
    made = found.pop(address(y), None) is not None
    sizes = [size(tensor) for tensor in found.values()]
    return Kept(sum(sizes), max(sizes, default=0), given, made)


def limit_memory(gigabytes: int) -> None:
    """What needs more than this fails, and not the machine."""
    most = gigabytes << 30
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def give_back() -> None:
    """Freed memory goes back to the system."""
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak(call: Callable[[], object], device: str = "cpu") -> float:
    """The most MB in memory during a call: resident ones, or those allocated on the GPU."""
    give_back()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / MB
    Path("/proc/self/clear_refs").write_text("5")
    call()
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def machine(device: str = "cpu") -> str:
    """What the numbers were measured on, in words."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lycoris-lora", "peft"))
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, {libraries}"
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else "a processor"
    features = torch.backends.cpu.get_cpu_capability()
    return f"One thread of {name} ({features}), {libraries}"


def update(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Results that are in the file already, with these in their places; written back."""
    before = json.loads(path.read_text()) if path.exists() else {}
    after = _merged(before, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(after, indent=1, sort_keys=True) + "\n")
    return after


def _merged(before: Any, after: Any) -> Any:
    if not (isinstance(before, dict) and isinstance(after, Mapping)):
        return after
    # What was measured replaces what was measured: a row is taken whole.
    if "error" in after or "ratio" in after or "merge_s" in after:
        return after
    return before | {key: _merged(before.get(key), value) for key, value in after.items()}


Scores = dict[str, list[bool]]  # what is asked -> whether each goal of it is met


def marked(scores: Scores, asked: str, text: str, met: bool) -> str:
    """The text of a cell, with a cross where its goal is missed."""
    scores.setdefault(asked, []).append(met)
    return text if met else f"{text} ✗"


def goals(scores: Scores) -> str:
    """How many goals are met, of all and of each kind."""
    if not scores:
        return ""
    everything = [met for kind in scores.values() for met in kind]
    each = ", ".join(f"{asked} {sum(met)} of {len(met)}" for asked, met in scores.items())
    return f" {sum(everything)} of {len(everything)} goals met ({each}); ✗ marks those missed."


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_section(name: str, text: str, path: Path = REPORT) -> None:
    """Put text between the two comments that mark a section of the report."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text()
    if begin not in page or end not in page:
        raise SystemExit(f"{path} has no section {begin} ... {end}")
    before, after = page.split(begin)[0], page.split(end)[1]
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
