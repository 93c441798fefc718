"""A mutated command line of `run --dry-run`: it is carried out, or refused in one line."""

import random
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.trials import child, hostile, study
from tests.trials.studies import LIMIT_S, judged, row
from tests.trials.table import Kind, Row

OPTIONS = (
    "--workers", "--workers=0", "--workers=-1", "--workers=x", "--workers=99999999999999999999",
    "--wandb", "--wandb=never", "--wandb=", "--no-fold", "--fold", "--out=", "--out=/dev/null",
    "--out=/proc/self", "--nothing", "-x", "--", "--dry-run=1", "--dryrun", "--version=x",
)  # fmt: skip


def trial(work: Path, seed: int, number: int) -> Row:
    plain = study.write(work / "tiny", study.WHOLE)
    child.warm(plain)
    rng = random.Random(f"{seed}/commands/{number}")
    out = work / f"command-{number}-runs"
    words, action = _mutated(rng, str(plain))
    try:
        arguments = ("run", *words, "--out", str(out), "--dry-run")
        if "--" in words:  # after which all words are settings
            arguments = ("run", "--out", str(out), "--dry-run", *words)
        ending = child.lyco(*arguments, limit_s=LIMIT_S)
        verdict = judged(ending) if not out.exists() else "written"
    finally:
        shutil.rmtree(out, ignore_errors=True)
    target = shlex.join(words).replace(f"{plain.parent}/", "")
    return row("commands", number, target, action, verdict, ending)


def _mutated(rng: random.Random, plain: str) -> tuple[list[str], str]:
    """The words after `run`, and what is wrong with them."""
    action = rng.choice(("settings", "settings", "settings", "characters", "options", "study"))
    words = [plain, *(_word(rng) for _ in range(rng.choice((1, 1, 2))))]
    if action == "characters":
        words[-1] = _argument(hostile.characters(words[-1], rng))
    elif action == "options":
        words = [plain, "train.lr=0.01"]
        words.insert(rng.randrange(len(words) + 1), rng.choice(OPTIONS))
    elif action == "study":
        values = [v for v in hostile.VALUES if isinstance(v, str)]
        words[0] = _argument(rng.choice((*values, plain + "/study.yaml", plain + "x", plain[:-1])))
    return words, action


def _word(rng: random.Random) -> str:
    key, value = hostile.setting(rng)
    return _argument(f"{key}={_spelled(value)}" if rng.random() < 0.95 else str(key))


def _spelled(value: Any) -> str:
    """As a user would type it behind the equals sign."""
    if isinstance(value, str):
        return value
    return (
        str(yaml.safe_dump(value, default_flow_style=True, width=10**9))
        .partition("\n...")[0]
        .strip()
    )


def _argument(text: str) -> str:
    """What a shell can hand over."""
    return text.replace("\0", "")


KIND = Kind("commands", 500, trial)
