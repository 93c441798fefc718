"""What an adapter costs a layer in training, beside the frozen layer and beside other libraries.

python tests/benchmarks/adapter_layers.py [--shapes lin320-320@4096,...] [--only REGEX]
    [--rounds 7] [--dtype float32|bfloat16] [--plans] [--device cuda]
    [--json FILE] [--table] [--quick]

A step is the layer's output and the gradients of its input and of the factors; the frozen layer's
is its output and the gradient of its input. Each shape has a process of its own, with one thread,
and freed memory kept (glibc's MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_). A
round makes one step of each contestant; the ratio is the median over rounds of its time to that of
the frozen layer in the same round. Noise is about 0.05 where the frozen layer takes 20 ms, twice
that at 1 ms.

What is saved for the backward pass leaves out parameters, the layer's input and its output: others
keep those as well, so they cost nothing more; `+x` and `+y` say that an adapter needs them.

--plans measures every plan beside the chosen one. One to four minutes of one core for each shape,
half an hour for all of them with their plans. --json adds to a file, row by row, and --table
writes docs/benchmarks.md from it; alone, it measures nothing.
"""

import argparse
import contextlib
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import (
    KEEP_FREED,
    MB,
    Scores,
    answer,
    goals,
    interleaved,
    isolated,
    kept,
    machine,
    markdown,
    marked,
    ratio,
    update,
    write_section,
)
from _peers import BLOCK, RANK, Contestant, contestants, in_words
from torch import Tensor, nn

from lyco_lab.adapters import geometry, plan
from lyco_lab.adapters.kernel import Sizes


@dataclass(frozen=True)
class Layer:
    inputs: int
    outputs: int
    side: int  # of the picture that a convolution sees; 0: a linear layer
    tokens: int

    def make(self) -> nn.Module:
        if self.side:
            return nn.Conv2d(self.inputs, self.outputs, 3, padding=1)
        return nn.Linear(self.inputs, self.outputs)

    def input(self, rng: torch.Generator) -> Tensor:
        shape = (1, self.tokens, self.inputs)
        if self.side:
            shape = (1, self.inputs, self.side, self.side)  # type: ignore[assignment]
        return torch.randn(shape, generator=rng)

    @property
    def weight(self) -> int:
        return self.inputs * self.outputs * (9 if self.side else 1)

    @property
    def judged(self) -> bool:
        """Whether goals are meant for it: at a millisecond, calling is what takes the time."""
        return self.weight * self.tokens >= 10**8


def linear(inputs: int, outputs: int, tokens: int) -> Layer:
    return Layer(inputs, outputs, 0, tokens)


def conv(channels: int, side: int) -> Layer:
    return Layer(channels, channels, side, side * side)


SHAPES = {
    "lin320-320@4096": linear(320, 320, 4096),
    "lin768-320@77": linear(768, 320, 77),
    "lin640-640@1024": linear(640, 640, 1024),
    "lin1280-1280@256": linear(1280, 1280, 256),
    "lin1280-1280@64": linear(1280, 1280, 64),
    "lin1280-10240@64": linear(1280, 10240, 64),
    "lin1280-10240@256": linear(1280, 10240, 256),
    "lin320-2560@4096": linear(320, 2560, 4096),
    "conv320@64x64": conv(320, 64),
    "conv640@32x32": conv(640, 32),
    "conv1280@16x16": conv(1280, 16),
    "conv1280@8x8": conv(1280, 8),
}
TINY = {"lin64-64@32": linear(64, 64, 32)}  # --quick


# The goals, as data: ratios of times on one thread in float32.


@dataclass(frozen=True)
class Goal:
    """Of one adapter: its step's time to the frozen layer's, and what it may save for backward."""

    many: float  # from 256 positions on
    few: float  # at 64
    conv: float | None = None  # of convolutions with many; None: as of linear layers
    widening: float | None = None  # of linear 320 -> 2560, where the output is most of the work
    saved: Callable[[Layer], int] = lambda layer: 0  # numbers beside input and output

    def time(self, layer: Layer) -> float:
        if layer.tokens < 256:
            return self.few
        if layer.side and self.conv is not None:
            return self.conv
        if layer.outputs == 8 * layer.inputs and layer.tokens >= 1024 and self.widening is not None:
            return self.widening
        return self.many


GOALS = {
    "lora": Goal(1.15, 1.12),
    "dora": Goal(1.30, 1.45, saved=lambda layer: layer.outputs * (RANK + 2)),
    "loha": Goal(1.45, 1.45),
    "loha4": Goal(1.25, 1.25),
    "lokr": Goal(1.30, 1.20),
    "lokr-full": Goal(1.55, 1.50),
    "oft": Goal(1.25, 1.30, conv=1.05, saved=lambda layer: layer.outputs * BLOCK),
    "boft": Goal(
        2.1, 2.8, conv=1.2, widening=2.9,
        saved=lambda layer: (layer.outputs // BLOCK).bit_length() * layer.outputs * BLOCK,
    ),
    "ia3": Goal(1.10, 1.10),
}  # fmt: skip


@dataclass(frozen=True)
class Lead:
    """How many times faster than the best of some others: the last that fits a layer counts."""

    least: float
    who: str = ""  # how the others are called begins so
    where: Callable[[Layer], bool] = lambda layer: True


def _many(layer: Layer) -> bool:
    return not layer.side and layer.tokens >= 1024


PARITY = 0.95
LEADS: dict[str, list[Lead]] = {
    "lora": [
        Lead(PARITY),
        Lead(1.4, where=lambda layer: layer.inputs == 320 and _many(layer)),
    ],
    "dora": [
        Lead(1.25, "peft", lambda layer: not layer.side),
        Lead(2.0, "lycoris"),
    ],
    "loha": [Lead(1.8), Lead(3.0, where=lambda layer: layer.tokens <= 64)],
    "loha4": [Lead(2.0), Lead(3.5, where=lambda layer: layer.tokens <= 64)],
    "lokr": [Lead(PARITY), Lead(1.4, where=_many)],
    "lokr-full": [Lead(PARITY), Lead(1.25, where=_many)],
    "oft": [Lead(1.1, "lycoris", lambda layer: bool(layer.side) or layer.tokens == 4096)],
    "boft": [Lead(1.5, "lycoris"), Lead(4.0, "lycoris", lambda layer: layer.tokens == 4096)],
    "ia3": [Lead(PARITY)],
}
PLAN_LOSS = 1.15  # the chosen plan's time to that of the best
WEIGHT_SIZED = 1.0  # no adapter saves a tensor that is as large as the weight


# One shape, in a process of its own.


@dataclass
class Runner:
    """One contestant on a layer of its own, and a step of it."""

    host: nn.Sequential
    x: Tensor
    gy: Tensor
    on: Contestant | None
    forced: Any = None

    def forward(self, x: Tensor) -> Tensor:
        with self._plan():
            y: Tensor = self.host(x)
        return y

    def step(self) -> None:
        parameters = self.on.parameters if self.on else []
        y = self.forward(self.x)
        torch.autograd.grad(y, [self.x, *parameters], self.gy, allow_unused=True)

    def _plan(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.forced is None else plan.forced(self.forced)

    def tensors(self) -> list[Tensor]:
        own = [*self.host.parameters(), *self.host.buffers()]
        return own + (self.on.tensors if self.on else [])


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """All contestants on one shape."""
    layer = (SHAPES | TINY)[task["shape"]]
    dtype, device = getattr(torch, task["dtype"]), task["device"]
    rng = torch.Generator().manual_seed(0)
    x = layer.input(rng).to(device, dtype).requires_grad_()
    start = layer.make()  # all stand on the same weight
    gy = torch.randn(start(layer.input(rng)).shape, generator=rng).to(device, dtype)

    def fresh() -> nn.Sequential:
        made = layer.make()
        made.load_state_dict(start.state_dict())
        return nn.Sequential(made).to(device, dtype).requires_grad_(False)

    runners = {"base": Runner(fresh(), x, gy, None)}
    chosen: dict[str, str] = {}
    errors: dict[str, str] = {}
    for name, put in contestants().items():
        if not re.search(task["only"], name):
            continue
        if name == "peft/boft" and layer.side:
            errors[name] = "left out: it builds permutations of (9 inputs)^2 for minutes"
            continue
        try:
            host = fresh()
            on = put(host)
            prepare(on, x, rng)
            runner = Runner(host, x, gy, on)
            runner.step()  # warm, and seen to run
        except Exception as error:  # one that does not take this kind of layer
            errors[name] = f"{type(error).__name__}: {error}"[:160]
            continue
        runners[name] = runner
        if on.ours is not None:
            chosen[name] = on.ours.explain(layer.tokens)[0].plan if dtype == torch.float32 else ""
            for way in plans(on, layer) if task["plans"] and dtype == torch.float32 else ():
                runners[f"{name} [{way}]"] = Runner(host, x, gy, on, way)
    for runner in runners.values():
        runner.step()
    calls = {name: runner.step for name, runner in runners.items()}
    times = interleaved(calls, task["rounds"], device)
    rows = {}
    for name, runner in runners.items():
        saved = kept(runner.forward, x, runner.tensors())
        rows[name] = {
            "ratio": ratio(times[name], times["base"]),
            "ms": statistics.median(times[name]) * 1000,
            "saved": asdict(saved),
            "params": sum(p.numel() for p in runner.on.parameters) if runner.on else 0,
            "plan": chosen.get(name, ""),
        }
    return {"rows": rows | {name: {"error": error} for name, error in errors.items()}}


@torch.no_grad()
def prepare(on: Contestant, x: Tensor, rng: torch.Generator) -> None:
    """Factors off their start, where some are zero; those of others in the layer's precision."""
    for tensor in on.tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(x.device, tensor.dtype if on.ours else x.dtype)
    for parameter in on.parameters:
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=rng).to(parameter))


def plans(on: Contestant, layer: Layer) -> Iterator[Any]:
    """The plans that a kernel has on this layer, and the layer by plain autograd."""
    assert on.ours is not None
    (adapted,) = on.ours.layers.values()
    op, shape = geometry.of(adapted), adapted.weight_shape
    kernel = plan.kernel_of(on.ours.adapter, op, shape)
    sizes = Sizes(layer.tokens, layer.outputs, layer.weight // layer.outputs)
    yield from kernel.costs(sizes)
    yield "reference"


# What came out, in words and tables.


def algorithm(name: str) -> str:
    """ours/lora -> lora, lycoris/lora/bypass -> lora."""
    return name.split("/")[1]


def others(rows: dict[str, Any], algo: str, who: str = "") -> dict[str, float]:
    return {
        name: row["ratio"]
        for name, row in rows.items()
        if name.startswith(("lycoris/", "peft/"))
        and name.startswith(who)
        and algorithm(name) == algo
        and "ratio" in row
    }


class Tables:
    """Cells of one file of results, with the goals that each of ours meets or misses."""

    def __init__(self, results: dict[str, Any], judge: bool) -> None:
        self.shapes = {n: results["shapes"][n] for n in SHAPES if n in results["shapes"]}
        self.judge = judge
        self.names = list(dict.fromkeys(
            name for name in ["base", *contestants()]
            if any(name in found["rows"] for found in self.shapes.values())
        ))  # fmt: skip
        self.ours = [name for name in self.names if name.startswith("ours/")]
        self.scores: Scores = {}

    def row(self, shape: str, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.shapes[shape]["rows"].get(name)
        return None if found is None or "error" in found else found

    def time(self, shape: str, name: str) -> str:
        row, goal, layer = self.row(shape, name), GOALS.get(_algo(name)), SHAPES[shape]
        if row is None:
            return ""
        text = f"{row['ratio']:.2f}"
        if name not in self.ours:
            return text
        text = f"**{text}**"
        if goal is None or not layer.judged or not self.judge:
            return text
        return self._score("time", text, row["ratio"] <= goal.time(layer))

    def lead(self, shape: str, name: str) -> str:
        row, layer, algo = self.row(shape, name), SHAPES[shape], _algo(name)
        if row is None:
            return ""
        rows = self.shapes[shape]["rows"]
        best = others(rows, algo)
        if not best:
            return ""
        who = min(best, key=lambda other: best[other])
        text = f"{best[who] / row['ratio']:.2f} ({_rival(who)})"
        if not layer.judged or not self.judge:
            return text
        asked: dict[str, Lead] = {}
        for lead in LEADS.get(algo, []):
            if lead.where(layer):
                asked[lead.who] = lead
        for lead in asked.values():
            rivals = others(rows, algo, lead.who)
            if rivals:
                met = min(rivals.values()) / row["ratio"] >= lead.least
                text = self._score("lead on others", text, met)
        return text.replace(" ✗ ✗", " ✗")

    def saved(self, shape: str, name: str) -> str:
        row, goal, layer = self.row(shape, name), GOALS.get(_algo(name)), SHAPES[shape]
        if row is None:
            return ""
        saved = row["saved"]
        text = f"{saved['bytes'] / MB:.2f}" if saved["bytes"] else "0"
        text += "+x" * saved["input"] + "+y" * saved["output"]
        if name not in self.ours or goal is None or not self.judge:
            return text
        return self._score("saved bytes", text, saved["bytes"] <= 4 * goal.saved(layer))

    def largest(self, shape: str, name: str) -> str:
        row = self.row(shape, name)
        if row is None:
            return ""
        share = row["saved"]["largest"] / (4 * SHAPES[shape].weight)
        text = f"{share:.2f}" if share else "0"
        if name not in self.ours or not self.judge:
            return text
        return self._score("largest tensor", text, share < WEIGHT_SIZED)

    def loss(self, shape: str, name: str) -> str:
        """The chosen plan, and its time to that of the best one."""
        row = self.row(shape, name)
        if row is None:
            return ""
        ways = {
            way.split("[")[1].rstrip("]"): found["ratio"]
            for way, found in self.shapes[shape]["rows"].items()
            if way.startswith(f"{name} [") and "[reference]" not in way
        }
        if row["plan"] not in ways:
            return row["plan"]
        best = min(ways, key=lambda way: ways[way])
        share = ways[row["plan"]] / ways[best]
        text = row["plan"] if best == row["plan"] else f"{row['plan']} ({share:.2f} of {best})"
        return self._score("choice of plan", text, share <= PLAN_LOSS)

    def _score(self, name: str, text: str, met: bool) -> str:
        return marked(self.scores, name, text, met)

    def table(self, cell: Callable[[str, str], str], names: list[str]) -> str:
        rows = [[in_words(n), *(cell(shape, n) for shape in self.shapes)] for n in names]
        return markdown(["", *(shape.removeprefix("lin") for shape in self.shapes)], rows)

    def text(self, results: dict[str, Any]) -> str:
        named = sorted((n for n in self.names if n != "base"), key=self._order)
        base = ["frozen layer, ms"] + [
            f"{found['rows']['base']['ms']:.1f}" if "base" in found["rows"] else ""
            for found in self.shapes.values()
        ]
        time = self.table(self.time, named) + f"\n| {' | '.join(base)} |"
        parts = [
            ("Time of a step to the frozen layer's", time),
            ("Times faster than the best of the others", self.table(self.lead, self.ours)),
            ("MB saved for the backward pass", self.table(self.saved, named)),
            ("The largest saved tensor to the weight", self.table(self.largest, named)),
            ("The plan chosen", self.table(self.loss, self.ours)),
        ]
        body = "\n\n".join(f"**{title}**\n\n{rows}" for title, rows in parts)
        head = f"{results['machine']}; {results['dtype']}."
        return f"{head}{goals(self.scores)}\n\n{body}"

    def _order(self, name: str) -> tuple[int, int]:
        algorithms = list(dict.fromkeys(_algo(other) for other in self.names if other != "base"))
        return algorithms.index(_algo(name)), self.names.index(name)


def _algo(name: str) -> str:
    return algorithm(name) if "/" in name else ""


def _rival(name: str) -> str:
    who, _, *mode = name.split("/")
    return " ".join([who, *mode])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="", help="names or their beginnings, with commas")
    parser.add_argument("--only", default="", help="contestants to measure: a regular expression")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--plans", action="store_true", help="every plan beside the chosen one")
    parser.add_argument("--json", type=Path, help="a file that the results are added to")
    parser.add_argument("--table", action="store_true", help="write docs/benchmarks.md from --json")
    parser.add_argument("--quick", action="store_true", help="one small shape, one round")
    given = parser.parse_args()
    if given.table:
        if given.json is None:
            parser.error("--table needs --json FILE")
        results = json.loads(given.json.read_text())
        text = Tables(results, judge=results["dtype"] == "float32").text(results)
        write_section(f"layers in {results['dtype']}", text)
        return
    starts = tuple(given.shapes.split(","))
    shapes = TINY if given.quick else {n: s for n, s in SHAPES.items() if n.startswith(starts)}
    if not shapes:
        parser.error(f"no shape begins with {given.shapes}: {', '.join(SHAPES)}")
    kept_freed = KEEP_FREED if given.device == "cpu" else {}
    print(f"{machine(given.device)}, {given.dtype}", *(f"{k}={v}" for k, v in kept_freed.items()))
    for name in shapes:
        task = {
            "shape": name,
            "only": given.only,
            "rounds": 1 if given.quick else given.rounds,
            "dtype": given.dtype,
            "device": given.device,
            "plans": given.plans,
        }
        found = isolated(__file__, task, env=kept_freed)
        show(name, found)
        if given.json is not None and "error" not in found:
            head = {"machine": machine(given.device), "dtype": given.dtype}
            update(given.json, head | {"shapes": {name: found}})


def show(shape: str, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"\n{shape}: {found['error']}", flush=True)
        return
    rows = found["rows"]
    print(f"\n{shape}: frozen layer {rows['base']['ms']:.1f} ms")
    weight = 4 * (SHAPES | TINY)[shape].weight
    for name, row in rows.items():
        if "error" in row:
            print(f"  {name:34} {row['error']}")
            continue
        saved = row["saved"]
        needs = "+x" * saved["input"] + "+y" * saved["output"]
        print(
            f"  {name:34} {row['ratio']:6.2f} {row['ms']:9.2f} ms"
            f"   saved {saved['bytes'] / MB:7.2f} MB{needs:5}"
            f" largest {saved['largest'] / weight:5.2f} of W"
            f"   {row['params']:9} params   {row['plan']}",
            flush=True,
        )


if __name__ == "__main__" and not answer(measure):
    main()
