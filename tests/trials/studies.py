"""A mutated study.yaml under `run --dry-run`: it is read, or refused in one line."""

import random
import shutil
from pathlib import Path

from tests.trials import child, hostile, study
from tests.trials.child import Ending
from tests.trials.table import OK, Kind, Row

LIMIT_S = 20
MOST_MB = 400  # above what the imports take
SOURCES = ("tiny", "demo", "folding", "gamma")


def trial(work: Path, seed: int, number: int) -> Row:
    plain = study.write(work / "tiny", study.WHOLE)
    child.warm(plain)
    rng = random.Random(f"{seed}/studies/{number}")
    folder, out = work / f"study-{number}", work / f"study-{number}-runs"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        name, action = _write_mutated(folder, plain, rng)
        arguments = ("run", str(folder), "--out", str(out), "--dry-run")
        ending = child.lyco(*arguments, limit_s=LIMIT_S)
        verdict = judged(ending) if not out.exists() else "written"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    return row("studies", number, name, action, verdict, ending)


def _write_mutated(folder: Path, plain: Path, rng: random.Random) -> tuple[str, str]:
    """Write it; returns the name of the study that it was, and of what was done to it."""
    name = rng.choice(SOURCES)
    source = plain if name == "tiny" else study.ROOT / "experiments" / name
    text = (source / "study.yaml").read_text()
    text = text.replace("../base.yaml", str(study.ROOT / "experiments" / "base.yaml"))
    folder.mkdir(parents=True)
    if rng.random() < 0.1:
        (folder / "study.yaml").write_bytes(hostile.octets(text.encode(), rng))
        return name, hostile.octets.__name__
    edit = rng.choice(hostile.EDITS)
    (folder / "study.yaml").write_text(edit(text, rng), newline="")
    return name, edit.__name__


def judged(ending: Ending) -> str:
    """The verdict on a command that reads what may be wrong, and does nothing."""
    if ending.fault:
        return ending.fault
    if ending.code not in (0, 2):
        return "exit code"
    if ending.code == 2 and not ending.one_line:
        return "not one line"
    if ending.code == 0 and ending.said:
        return "noise"
    if ending.peak_mb > MOST_MB:
        return "memory"
    return OK


def row(kind: str, number: int, target: str, action: str, verdict: str, ending: Ending) -> Row:
    detail = "" if verdict == OK else ending.last_words
    return Row(
        kind, number, target, action, verdict, ending.code, ending.seconds, ending.peak_mb, detail
    )


KIND = Kind("studies", 500, trial)
