"""A study: a folder with a study.yaml, which says what is asked and which runs answer it.

    question      what is asked, in a sentence
    expectation   what should come out, said before it is run
    base          another YAML with the settings to start from, relative to this file
    set           settings of every run
    grid          dotted key -> list of values; one run for each combination
    runs          variants, each {name, set, grid}; each is combined with the grid, or with its
                  own `grid` where it has one ({}: a single run)
    pairs         [name, name]: runs whose losses must be equal bit for bit

A run is called after its variant and its grid values, so `lora` over `data.concept: [kael]` is
`lora-kael`. Settings on the command line apply to every run; where one names a key of the grid,
the grid shrinks to that value.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lyco_lab.config.compose import (
    Layer,
    Nested,
    build,
    check_keys,
    learn_kinds,
    nest,
    parse_overrides,
    read_yaml,
)
from lyco_lab.config.run import Run
from lyco_lab.errors import UserError, nearest
from lyco_lab.settings import LONGEST_PATH, SHOWN, shown

STUDY_KEYS = ("question", "expectation", "base", "set", "grid", "runs", "pairs")
VARIANT_KEYS = ("name", "set", "grid")
COMMAND_LINE = "the command line"
MOST_RUNS = 10_000  # of a grid


@dataclass(frozen=True)
class Study:
    name: str  # of its folder
    question: str
    expectation: str
    folder: Path
    runs: tuple[Run, ...]
    pairs: tuple[tuple[str, str], ...] = ()  # names of runs

    def run(self, name: str) -> Run:
        """The run called `name`."""
        return next(run for run in self.runs if run.name == name)


@dataclass(frozen=True)
class _Variant:
    name: str  # "": the study's only one, called after the study
    settings: Nested
    grid: dict[str, list[Any]]
    origin: str


def load_study(folder: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Study:
    """Read `folder`/study.yaml and spell out its runs."""
    folder = Path(folder)
    path = folder / "study.yaml"
    if not os.path.isfile(path):  # Path.is_file raises an error for a name that is too long
        raise UserError(_not_a_study(folder))
    read = read_yaml(path)
    _only(read, STUDY_KEYS, str(path))
    for key in ("question", "expectation"):
        if not isinstance(read.get(key), str) or not read[key].strip():
            raise UserError(f"{path} needs a {key}, in a sentence, got {shown(read.get(key))}")
    name = folder.resolve().name
    given = parse_overrides(overrides)
    learn_kinds(read, str(path))
    learn_kinds(given, COMMAND_LINE)
    check_keys(nest(given, COMMAND_LINE), COMMAND_LINE)

    common = [Layer(f"{path} (set)", _mapping(read.get("set"), "set", path))]
    if read.get("base") is not None:
        named = read["base"]
        right = isinstance(named, str) and named.isprintable() and len(named) <= LONGEST_PATH
        if not right:
            raise UserError(f"base in {path} is {shown(read['base'])}, needs the path of a file")
        base = path.parent / read["base"]
        common.insert(0, Layer(str(base), read_yaml(base)))
    runs: dict[str, Run] = {}
    settings: dict[str, Nested] = {}
    memory: dict[tuple[str, str], Nested] = {}
    for variant in _variants(read, path):
        for run in _runs(name, variant, common, given, memory):
            if run.name in runs:
                raise UserError(f"two runs of {path} are called {run.name!r}: name them apart")
            runs[run.name] = run
            settings[run.name] = variant.settings
    pairs = tuple(_pairs(read, list(runs), path))
    for first, second in pairs:
        for key in given:
            if _get(settings[first], key) != _get(settings[second], key):
                raise UserError(
                    f"{key} cannot be set for every run: the pair {first}, {second} of {path} "
                    "needs a value of its own for each; change it there"
                )
    by_hash: dict[str, str] = {}
    for run in runs.values():
        if run.hash in by_hash:
            twins = f"{by_hash[run.hash]!r} and {run.name!r}"
            raise UserError(f"{twins} of {path} are the same configuration: leave one out")
        by_hash[run.hash] = run.name
    return Study(
        name=name,
        question=read["question"].strip(),
        expectation=read["expectation"].strip(),
        folder=folder,
        runs=tuple(runs.values()),
        pairs=pairs,
    )


def _runs(
    study: str,
    variant: _Variant,
    common: list[Layer],
    given: dict[str, Any],
    memory: dict[tuple[str, str], Nested],
) -> Iterator[Run]:
    grid = {key: [given[key]] if key in given else vs for key, vs in variant.grid.items()}
    count = math.prod(map(len, grid.values()))
    if count > MOST_RUNS:
        raise UserError(
            f"the grid of {variant.origin} asks for {count:,} runs, needs at most {MOST_RUNS:,}"
        )
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        labels = [_label(key, value) for key, value in point.items()]
        name = "-".join([variant.name, *labels] if variant.name or labels else [study])
        layers = [
            *common,
            Layer(variant.origin, variant.settings),
            Layer(f"{variant.origin}, grid", {k: v for k, v in point.items() if k not in given}),
            Layer(COMMAND_LINE, given),
        ]
        try:
            yield build(name.strip("-"), study, layers, memory)
        except UserError as error:
            raise UserError(f"{error} (run {name.strip('-')!r})") from error


def _label(key: str, value: Any) -> str:
    """A grid value as part of a run's name: words speak for themselves, numbers need their key."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, list | tuple):
        text = key.split(".")[-1] + "_".join(map(str, value))
    else:
        text = f"{key.split('.')[-1]}{value}"
    return re.sub(r"[^A-Za-z0-9._]+", "_", text)


def _variants(read: Nested, path: Path) -> Iterator[_Variant]:
    grid = _grid(read.get("grid"), str(path))
    if "runs" not in read:
        yield _Variant("", {}, grid, str(path))
        return
    if not isinstance(read["runs"], list) or not read["runs"]:
        raise UserError(f"runs in {path} is {read['runs']!r}, needs a list of {{name, set}}")
    for number, entry in enumerate(read["runs"], start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UserError(f"run {number} of {path} is {shown(entry)}, needs a name and its `set`")
        origin = f"{path} (run {entry['name']!r})"
        _only(entry, VARIANT_KEYS, origin)
        settings = nest(_mapping(entry.get("set"), "set", path), origin)
        own = _grid(entry["grid"], origin) if "grid" in entry else grid
        for key in own:
            if _get(settings, key) is not None:
                raise UserError(f"{key} is set in {origin} and also in its grid: keep one")
        yield _Variant(entry["name"], settings, own, origin)


def _grid(read: Any, origin: str) -> dict[str, list[Any]]:
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise UserError(f"the grid of {origin} is {shown(read)}, needs key: [values]")
    for key, values in read.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"{key} in the grid of {origin} is {shown(values)}, needs a list of values"
            )
        if any(isinstance(value, dict) for value in values):
            raise UserError(f"{key} in the grid of {origin} has sections as values: use `runs`")
    return {str(key): values for key, values in read.items()}


def _pairs(read: Nested, names: list[str], path: Path) -> Iterator[tuple[str, str]]:
    pairs = read.get("pairs") or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
            raise UserError(f"a pair in {path} is {shown(pair)}, needs the names of two runs")
        for name in pair:
            if name not in names:
                hint = nearest(str(name), names)
                raise UserError(f"pairs in {path} names {name!r}, which is not a run{hint}")
        yield pair[0], pair[1]


def _get(nested: Nested, dotted: str) -> Any:
    """The value at `dotted`; None where there is none."""
    here: Any = nested
    for part in dotted.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def _mapping(read: Any, key: str, path: Path) -> Nested:
    if not isinstance(read, dict | None):
        raise UserError(f"{key} in {path} is {shown(read)}, needs settings below it")
    return read or {}


def _only(read: Mapping[str, Any], known: tuple[str, ...], origin: str) -> None:
    for key in read:
        if key not in known:
            hint = nearest(str(key), known) or f" (it takes {', '.join(known)})"
            raise UserError(f"unknown key {key!r} in {origin}{hint}")


def _not_a_study(folder: Path) -> str:
    if os.path.isfile(folder):
        return f"{folder} is a file, needs the folder of a study, with a study.yaml in it"
    problem = "has no study.yaml in it" if os.path.isdir(folder) else "does not exist"
    if len(str(folder)) > SHOWN:
        return f"{shown(str(folder))} is not a study"
    siblings = folder.parent.iterdir() if os.path.isdir(folder.parent) else ()
    studies = [str(path) for path in siblings if (path / "study.yaml").is_file()]
    return f"{folder} is not a study: it {problem}{nearest(str(folder), studies)}"
