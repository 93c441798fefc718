"""What an adapter costs a training step of Stable Diffusion 1.5's whole UNet.

python tests/benchmarks/adapter_unet.py [--only REGEX] [--latent 32] [--steps 3] [--device cuda]
    [--json FILE] [--table] [--quick]

A step is forward, backward and AdamW, batch 1; the frozen model's is forward and the gradient of
its input. The weights are random. Each contestant has a process of its own, one after the other,
with one thread, glibc's own settings and 13 GiB of data at most: the frozen model's steps, the
adapter's, and the frozen model's again once it is taken off. The ratio is the median step's to the
mean of the medians before and after. Saved MB and peak resident MB are those above the frozen
model's.

About two minutes for each contestant on one slow core; an hour for all. --json adds to a file, row
by row, and --table writes docs/benchmarks.md from it; alone, it measures nothing.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _unet
import torch
from _measure import (
    MB,
    Scores,
    answer,
    give_back,
    goals,
    isolated,
    limit_memory,
    machine,
    markdown,
    marked,
    peak,
    recorded,
    size,
    timed,
    update,
    write_section,
)
from _peers import contestants, in_words

MINUTES = 15  # for one contestant

# The goals, as data. Times are ratios on one thread.
STEP = {"lora": 1.15, "lokr": 1.20, "dora": 1.20, "loha": 1.40, "oft": 1.10}
SAVED_MB = 80  # each layer's input, at 32 x 32
SAVED_BOTH_MB = {"dora": 180}  # the output as well, which not every layer after it keeps
PEAK_MB = 800
ATTACH_S = 0.35


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One contestant."""
    device, steps = task["device"], task["steps"]
    if device == "cpu":
        limit_memory(_unet.LIMIT_GB)
    unet = _unet.make(device, small=task["quick"])
    latents, timestep, prompt = _unet.inputs(task["latent"], device)

    def forward() -> torch.Tensor:
        sample: torch.Tensor = unet(latents, timestep, encoder_hidden_states=prompt).sample
        return sample

    def step(parameters: list[Any], optimizer: Any = None) -> None:
        loss = forward().square().mean()
        grads = torch.autograd.grad(loss, [latents, *parameters], allow_unused=True)
        if optimizer is not None:
            for parameter, grad in zip(parameters, grads[1:], strict=True):
                parameter.grad = grad
            optimizer.step()
            optimizer.zero_grad()

    def saved(tensors: list[torch.Tensor]) -> float:
        with recorded([*unet.parameters(), *unet.buffers(), *tensors]) as kept:
            forward()
        return sum(map(size, kept.values())) / MB

    def median(call: Callable[[], None]) -> float:
        return statistics.median(timed(call, device) for _ in range(steps))

    step([])  # warm
    base_saved, base_peak = saved([]), peak(lambda: step([]), device)
    before = median(lambda: step([]))

    began = time.process_time()
    on = contestants()[task["name"]](unet)
    attach_s = time.process_time() - began
    for parameter in on.parameters:
        parameter.requires_grad_(True)
    optimizer: Any = torch.optim.AdamW(on.parameters, lr=1e-6)
    row = {
        "attach_s": attach_s,
        "params": sum(parameter.numel() for parameter in on.parameters),
        "saved_mb": saved(on.tensors) - base_saved,
        "peak_mb": peak(lambda: step(on.parameters, optimizer), device) - base_peak,
        "step_s": median(lambda: step(on.parameters, optimizer)),
    }

    on.restore()
    unet.requires_grad_(False)
    optimizer = None
    give_back()
    after = median(lambda: step([]))
    base = (before + after) / 2
    return row | {"ratio": row["step_s"] / base, "base_s": base, "base_saved_mb": base_saved}


def text(results: dict[str, Any]) -> str:
    scores: Scores = {}
    rows = []
    order = [name for name in contestants() if name in results["rows"]]
    algorithms = list(dict.fromkeys(name.split("/")[1] for name in order))
    for name in sorted(order, key=lambda name: algorithms.index(name.split("/")[1])):
        row, algo = results["rows"][name], name.split("/")[1]
        if "error" in row:
            rows.append([in_words(name), row["error"], *[""] * 5])
            continue
        most = SAVED_BOTH_MB.get(algo, SAVED_MB)
        cells = {
            "time": (f"{row['ratio']:.2f}", row["ratio"] <= STEP.get(algo, float("inf"))),
            "saved": (f"{row['saved_mb']:.0f}", row["saved_mb"] <= most),
            "peak": (f"{row['peak_mb']:.0f}", row["peak_mb"] <= PEAK_MB),
            "attach": (f"{row['attach_s']:.2f}", row["attach_s"] <= ATTACH_S),
        }
        shown = {
            asked: marked(scores, asked, f"**{cell}**", met)
            if name.startswith("ours/") and (asked != "time" or algo in STEP)
            else cell
            for asked, (cell, met) in cells.items()
        }
        times = f"{row['step_s']:.1f} ({row['base_s']:.1f})"
        params = f"{row['params'] / 1e6:.2f} M"
        rows.append([in_words(name), shown["time"], times, shown["saved"], shown["peak"],
                     shown["attach"], params])  # fmt: skip
    head = ["", "to the frozen model's", "step, s (frozen)", "saved above it, MB",
            "peak above it, MB", "attach, s", "parameters"]  # fmt: skip
    return f"{results['machine']}.{goals(scores)}\n\n{markdown(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="contestants to measure: a regular expression")
    parser.add_argument("--latent", type=int, default=32, help="side of the latents")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="a file that the results are added to")
    parser.add_argument("--table", action="store_true", help="write docs/benchmarks.md from --json")
    parser.add_argument("--quick", action="store_true", help="a small UNet, one step")
    given = parser.parse_args()
    if given.table:
        if given.json is None:
            parser.error("--table needs --json FILE")
        write_section("unet", text(json.loads(given.json.read_text())))
        return
    print(machine(given.device))
    for name in contestants():
        if not re.search(given.only, name):
            continue
        task = {
            "name": name,
            "latent": 8 if given.quick else given.latent,
            "steps": 1 if given.quick else given.steps,
            "device": given.device,
            "quick": given.quick,
        }
        why = _unet.LEFT_OUT.get(name.split("/")[1])
        row = {"error": why} if why else isolated(__file__, task, minutes=MINUTES)
        if "error" in row:
            print(f"  {name:26} {row['error']}", flush=True)
        else:
            print(
                f"  {name:26} {row['ratio']:6.2f} {row['step_s']:7.2f} s (frozen"
                f" {row['base_s']:.2f})   saved {row['saved_mb']:6.0f} MB"
                f"   peak {row['peak_mb']:6.0f} MB   attach {row['attach_s']:5.2f} s"
                f"   {row['params'] / 1e6:.2f} M params",
                flush=True,
            )
        if given.json is not None:
            update(given.json, {"machine": machine(given.device), "rows": {name: row}})


if __name__ == "__main__" and not answer(measure):
    main()
