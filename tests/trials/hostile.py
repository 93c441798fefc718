"""Values and edits that a file or a command line may hold by mistake or in bad faith."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import yaml

from lyco_lab.config.compose import KEYS
from tests.trials.study import ROOT

# As YAML reads them; None and the like stand for themselves.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 3.5, -0.0, 1e-300, 1e300, 1e38, -1e9, 10**9, 10**20, 2**63,
    float("nan"), float("inf"), float("-inf"), "", " ", "null", "~", "???", "010", "1_000", "0x10",
    "1e3", "1e-4", "yes", "on", "[/]", "[bold red]", "[link=x]", "${seed}", "${oc.env:HOME}",
    "${oc.env:NO_SUCH_NAME_ANYWHERE}", "${data}", "${", "\x00", "\ufeff", "\u202e", "ä", "日本語",
    "a" * 300, "a" * 100_000, "../..", "/", "/dev/zero", "/dev/null", "/proc/self",
    "/proc/self/mem", "no/such/file", "set #2", "a photo of ", "=", "a=b", "-1", "--help", "@x",
    "=1+1", "lora", "cpu", "2026-01-01", [], [[]], [1, 2], [0, 0, 0], ["a", None], {}, {"a": 1},
    {1: 2}, {"kind": "lora"}, [{}], [{"factors": ["*"]}], [{"optimizer": {"lr": 2}}], ["x"] * 1000,
)  # fmt: skip
TYPED = (
    "!!binary aGVsbG8=", "!!set {a, b}", "!!timestamp 2026-01-01", "!!python/object:os.system {}",
    "!!float x", "&a [*a]", "*nowhere", "{", "]", "'", "!<tag:x> 1", "? [a]: b",
)  # fmt: skip
BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(9))

Edit = Callable[[str, random.Random], str]


# Of the kind that a setting has, so that many are accepted and what is behind them is met.
NUMBERS = (0, 1, 2, 3, 8, 64, 1000, 10**6, 0.5, 1e-6, 0.1, 1.5, 1e4)
WORDS = (
    None, "loha", "lokr", "oft", "dora", "native", "lion", "sgd", "prodigy", "adafactor", "cosine",
    "linear", "polynomial", "huber", "full", "attn-only", "bf16", "ema", "v_prediction", "sd1",
    "alpha", "files", "fp16", "live", "random", "keep", "classes", "drop", "cpu", "ddp", "offline",
    "class", "logit_normal", "kael", "falls", "sks", 2,
)  # fmt: skip


def setting(rng: random.Random) -> tuple[str, Any]:
    """One of the settings, and a value: any at all, or one of the kind that it has."""
    if rng.random() < 0.4:
        return rng.choice(KEYS), rng.choice(VALUES)
    key, usual = rng.choice(usual_settings())
    if isinstance(usual, bool):
        return key, not usual
    if isinstance(usual, int | float):
        return key, rng.choice((*NUMBERS, 2 * usual, usual // 2, usual))
    return key, rng.choice((*WORDS, *NUMBERS, usual))


@cache
def usual_settings() -> list[tuple[str, Any]]:
    """The settings that every run has, and where they begin."""
    read = yaml.safe_load((ROOT / "experiments" / "base.yaml").read_text())
    return [
        (f"{section}.{key}", value)
        for section, values in read.items()
        if isinstance(values, dict)
        for key, value in values.items()
    ]


def put_values(text: str, rng: random.Random) -> str:
    """Settings of every run, or of one, get other values."""
    read = yaml.safe_load(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key, value = setting(rng)
        places = [read.setdefault("set", {}), *(run.setdefault("set", {}) for run in read["runs"])]
        rng.choice(places)[key] = value
    return str(yaml.safe_dump(read, allow_unicode=True))


def replace_node(text: str, rng: random.Random) -> str:
    """Whatever stands somewhere in the file is something else, or gone, or called otherwise."""
    read = yaml.safe_load(text)
    holder, key = rng.choice(list(nodes(read)))
    action = rng.randrange(4)
    if action == 0:
        holder[key] = rng.choice(VALUES)
    elif action == 1:
        del holder[key]
    elif isinstance(holder, dict):
        name = rng.choice((str(key)[:-1], f"{key}s", str(key).upper(), f"{key}.x", "", 3, None))
        holder[name] = holder.pop(key) if action == 2 else holder[key]
    else:
        holder.insert(rng.randrange(len(holder) + 1), holder[key])
    return str(yaml.safe_dump(read, allow_unicode=True))


def replace_text(text: str, rng: random.Random) -> str:
    """What stands after a colon is another piece of YAML."""
    lines = text.splitlines()
    at = rng.choice([i for i, line in enumerate(lines) if ": " in line])
    lines[at] = lines[at].partition(":")[0] + ": " + rng.choice((*TYPED, f"\n{BOMB}b: *a8"))
    return "\n".join(lines) + "\n"


def lines_moved(text: str, rng: random.Random) -> str:
    """A line is doubled, gone, indented or somewhere else."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    line = lines[at] if rng.random() < 0.3 else lines.pop(at)
    line = rng.choice((line, f"  {line}", line.lstrip(), f"\t{line}", f"- {line}", f"{line}:"))
    lines.insert(rng.randrange(len(lines) + 1), line)
    return "\n".join(lines) + "\n"


def characters(text: str, rng: random.Random) -> str:
    """A few characters are others, more, or none."""
    found = list(text)
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(len(found))
        found[at] = rng.choice(("", found[at] * 2, rng.choice("\t\n\r\0:-[]{}'\"#&*!|>%@`?,\x85é")))
    return "".join(found)


EDITS: tuple[Edit, ...] = (
    put_values,
    put_values,
    put_values,
    put_values,
    replace_node,
    replace_text,
    lines_moved,
    characters,
)


def octets(content: bytes, rng: random.Random) -> bytes:
    """A file is cut, one of its bits is turned, or bytes are put into it."""
    at, action = rng.randrange(len(content)), rng.randrange(3)
    if action == 0:
        return content[:at]
    if action == 1:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    return content[:at] + rng.randbytes(rng.choice((1, 4, 1000))) + content[at:]


def nodes(read: Any) -> list[tuple[Any, Any]]:
    """Every place in nested mappings and lists, as its holder and its key."""
    if not isinstance(read, dict | list):
        return []
    keys = list(read) if isinstance(read, dict) else list(range(len(read)))
    return [(read, key) for key in keys] + [found for key in keys for found in nodes(read[key])]
