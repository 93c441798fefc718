"""Of four runs one diverges and the process of another is killed: the others are finished.

The page and the screen name those that failed, the command exits 1, and `--retry-failed` tries
them again: the killed one comes to its undisturbed result, and the one that diverges diverges again
until its own learning rate is mended in the study, which makes it another run.
"""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

from tests.trials import interruptions, study
from tests.trials.child import TRACEBACK
from tests.trials.table import OK, Kind, Row

DIVERGES = """
  - name: diverges
    set:
      data: {{concept: octo, limit: 6}}
      adapter: {{kind: lora, rank: 2, alpha: 4.0}}
      train: {{lr: {lr}}}
"""
KILLED = """
  - name: killed
    set:
      data: {{concept: kael, limit: 6}}
      adapter: {{kind: loha, rank: 2, alpha: 2.0}}
      train: {{steps: 40}}
"""
WAIT_S = 600


def four(lr: str) -> tuple[str, ...]:
    return study.LORA, KILLED, study.LOKR, DIVERGES.replace("{lr}", lr)


def trial(work: Path, seed: int, number: int) -> Row:
    """Even numbers kill in the training, odd ones in whatever stage comes."""
    made = study.finished(work, "four", four("1e-2"))
    root = work / f"failure-{number}"
    plain = study.write(work / f"failing-{number}" / made.name, four("1e30"))
    rng = random.Random(f"{seed}/failures/{number}")
    began_s = time.monotonic()
    try:
        verdict, code, detail = _of(made, plain, root, rng, number)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(plain.parent, ignore_errors=True)
    seconds = time.monotonic() - began_s
    action = "the training is killed" if number % 2 == 0 else "some stage is killed"
    return Row("failures", number, "four", action, verdict, code, seconds, 0, detail)


def _of(
    made: study.Finished, plain: Path, root: Path, rng: random.Random, number: int
) -> tuple[str, int | str, str]:
    arguments = ["run", str(plain), "--out", str(root), "--workers", "2"]
    watched = interruptions.begin(arguments)
    pid = _at_work_on(watched.process.pid, root, training=number % 2 == 0)
    if pid is None:
        interruptions.end(watched.process.pid)
        watched.finish(5)
        return "untried", "", "no worker was ever at work on the run that is to be killed"
    time.sleep(rng.uniform(0, 0.3))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    code = watched.finish(WAIT_S)
    text = watched.text.decode(errors="replace")
    if code is None:
        return "stuck", "", text[-300:]
    if TRACEBACK in text:
        return "traceback", code, text[-300:]
    if code != 1:
        return "exit code", code, f"needs 1: {text[-300:]}"
    if lacking := [name for name in ("diverges", "killed") if name not in text[-2000:]]:
        return "unnamed", code, f"the screen does not name {lacking}"
    if why := _unfinished(made, root, ("lora", "lokr")):
        return "unfinished", code, why
    page = root / made.name / "report.html"
    text = page.read_text() if page.is_file() else ""
    if lacking := [name for name in ("diverges", "killed") if name not in text]:
        return "page", code, f"the page does not name {lacking}"
    return _retried(made, plain, root, arguments)


def _retried(
    made: study.Finished, plain: Path, root: Path, arguments: list[str]
) -> tuple[str, int | str, str]:
    """First as it is, then with a learning rate that converges."""
    again = interruptions.begin([*arguments, "--retry-failed"])
    code = again.finish(WAIT_S)
    if code != 1 or TRACEBACK.encode() in again.text:
        return "retry", code or 0, f"needs 1, it still diverges: {again.text[-300:]!r}"
    if why := _unfinished(made, root, ("lora", "lokr", "killed")):
        return "retry", code, why
    study.write(plain, four("1e-2"))
    mended = interruptions.begin([*arguments, "--retry-failed"])
    code = mended.finish(WAIT_S)
    if code != 0:
        return "unmended", code or "", f"exit code {code}: {mended.text[-300:]!r}"
    if why := _unfinished(made, root, ("lora", "lokr", "killed", "diverges")):
        return "unmended", code, why
    ours, theirs = study.tables(root), study.tables(made.root)
    if other := study.differing(ours, theirs):
        return "silent", code, f"differs: {' '.join(other)}"
    return OK, 1, ""


def _unfinished(made: study.Finished, root: Path, names: tuple[str, ...]) -> str:
    """What lacks of the undisturbed results of these runs."""
    ours, theirs = study.results(root), study.results(made.root)
    wanted = {k: v for k, v in theirs.items() if k.partition("/")[0].rpartition("-")[0] in names}
    wrong = sorted(key for key, value in wanted.items() if ours.get(key) != value)
    return f"differs: {' '.join(wrong)}" if wrong or not wanted else ""


def _at_work_on(leader: int, root: Path, *, training: bool) -> int | None:
    """The worker that holds the lock of the run that is to be killed; None if that never comes."""
    ends_s = time.monotonic() + WAIT_S
    while time.monotonic() < ends_s and interruptions.session(leader):
        folder = next(root.glob("killed-????????"), None)
        if folder and (not training or (folder / "train/metrics.csv").is_file()):
            for pid in interruptions.workers(leader):
                if folder.name in interruptions.runs_of(pid, root):
                    return pid
        time.sleep(0.05)
    return None


KIND = Kind("failures", 4, trial)
