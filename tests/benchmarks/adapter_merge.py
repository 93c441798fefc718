"""How long it takes to merge an adapter into Stable Diffusion 1.5's whole UNet.

python tests/benchmarks/adapter_merge.py [--only REGEX] [--rounds 1] [--device cuda]
    [--json FILE] [--table] [--quick]

The limit is one pass that reads and writes every adapted weight, timed in the same process. Each
contestant has a process of its own, one after the other, with one thread, glibc's own settings and
13 GiB of data at most; with several rounds, the medians of as many processes. lyco_lab's `merge()`
keeps the frozen weights aside, so that unmerging is exact; "in place" is
`merge(keep_base=False)`, which takes no memory.

About 15 seconds of one core for each contestant and round, a quarter of an hour for all. --json
adds to a file, row by row, and --table writes docs/benchmarks.md from it; alone, it measures
nothing.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import _unet
import torch
from _measure import (
    Scores,
    answer,
    goals,
    isolated,
    limit_memory,
    machine,
    markdown,
    marked,
    timed,
    update,
    write_section,
)
from _peers import Attach, contestants, in_words, ours, sections, targets

MINUTES = 10  # for one contestant
IN_PLACE = "/in place"

# The goals, as data: times of the pass that a merge in place may take, and how many times faster
# than the best of the others it is to be.
PASSES = {"lora": 3, "lokr": 2, "loha": 13, "oft": 13}
LEADS = {"lokr": 6}


def mergers() -> dict[str, Attach]:
    place = {f"ours/{name}{IN_PLACE}": ours(s, keep_base=False) for name, s in sections()}
    return contestants() | place


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One contestant."""
    device = task["device"]
    if device == "cpu":
        limit_memory(_unet.LIMIT_GB)
    unet = _unet.make(device, small=task["quick"])
    weights = [unet.get_submodule(name).weight for name in targets(unet)]

    @torch.no_grad()
    def touch() -> None:
        for weight in weights:
            weight.mul_(1.0)

    touch()
    pass_s = statistics.median(timed(touch, device) for _ in range(3))
    on = mergers()[task["name"]](unet)
    with torch.no_grad():
        return {"merge_s": timed(on.merge, device), "pass_s": pass_s}


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    for row in rows:
        if "error" in row:
            return row
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def text(results: dict[str, Any]) -> str:
    found = results["rows"]
    scores: Scores = {}
    order = [name for name in mergers() if name in found]
    algorithms = list(dict.fromkeys(name.split("/")[1] for name in order))
    rows = []
    for name in sorted(order, key=lambda name: algorithms.index(name.split("/")[1])):
        row, algo = found[name], name.split("/")[1]
        if "error" in row:
            rows.append([in_words(name), row["error"], ""])
            continue
        passes, merge_s = row["merge_s"] / row["pass_s"], f"{row['merge_s']:.2f}"
        shown = f"{passes:.1f}"
        if name.endswith(IN_PLACE):
            shown, merge_s = f"**{shown}**", f"**{merge_s}**"
            if algo in PASSES:
                shown = marked(scores, "passes", shown, passes <= PASSES[algo])
            rivals = [
                other["merge_s"]
                for rival, other in found.items()
                if not rival.startswith("ours/")
                and rival.split("/")[1] == algo
                and "error" not in other
            ]
            if algo in LEADS and rivals:
                met = min(rivals) / row["merge_s"] >= LEADS[algo]
                merge_s = marked(scores, "lead on others", merge_s, met)
        rows.append([in_words(name), merge_s, shown])
    passes_s = statistics.median(row["pass_s"] for row in found.values() if "error" not in row)
    head = f"{results['machine']}; one pass takes {passes_s:.2f} s.{goals(scores)}"
    return f"{head}\n\n{markdown(['', 'merge, s', 'passes'], rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="contestants to measure: a regular expression")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="a file that the results are added to")
    parser.add_argument("--table", action="store_true", help="write docs/benchmarks.md from --json")
    parser.add_argument("--quick", action="store_true", help="a small UNet")
    given = parser.parse_args()
    if given.table:
        if given.json is None:
            parser.error("--table needs --json FILE")
        write_section("merge", text(json.loads(given.json.read_text())))
        return
    print(machine(given.device))
    names = [name for name in mergers() if re.search(given.only, name)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            task = {"name": name, "device": given.device, "quick": given.quick}
            why = _unet.LEFT_OUT.get(name.split("/")[1])
            found[name].append({"error": why} if why else isolated(__file__, task, minutes=MINUTES))
            row = median(found[name])
            if "error" in row:
                print(f"  {name:26} {row['error']}", flush=True)
            else:
                passes = row["merge_s"] / row["pass_s"]
                print(f"  {name:26} {row['merge_s']:7.2f} s {passes:7.1f} passes", flush=True)
            if given.json is not None:
                update(given.json, {"machine": machine(given.device), "rows": {name: row}})


if __name__ == "__main__" and not answer(measure):
    main()
