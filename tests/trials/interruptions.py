"""A running study is killed, ended or interrupted; the same command then ends it as if nothing was.

The command is a process of its own, in a session of its own. The signal comes a moment after the
screen has told of a stage, since how long a stage takes depends on the machine's other work.
"""

import contextlib
import os
import random
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.trials import study
from tests.trials.child import TRACEBACK
from tests.trials.table import OK, Kind, Row

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
LIMIT_S = 600  # of a whole command, on a machine that has other work
# On a machine without other work (`busy`):
LEFT_S = 5  # after which no process of the session may be left
SECOND_S = 2  # after which a second Ctrl-C has ended the command
STAGES = 13  # of the study that is interrupted
TOLD = re.compile(rb"\[\d+/\d+\] ")  # what the screen says of each stage


@dataclass(frozen=True)
class Interruption:
    workers: int
    whom: str  # parent, group, worker
    number: signal.Signals
    stage: int  # it comes after so many stages were told of
    delay_s: float
    second_s: float | None  # a second SIGINT comes so long after the first

    def __str__(self) -> str:
        again = "" if self.second_s is None else f", again after {self.second_s:.2f} s"
        return f"{self.number.name} at stage {self.stage} + {self.delay_s:.2f} s{again}"


@dataclass
class Watched:
    """What is known of a command in a session of its own."""

    process: "subprocess.Popen[bytes]"
    text: bytes = b""

    def until(self, told: int, limit_s: float) -> bool:
        """Read its screen until it has told of so many stages; False if it ends before."""
        ends_s = time.monotonic() + limit_s
        assert self.process.stdout is not None
        number = self.process.stdout.fileno()
        while len(TOLD.findall(self.text)) < told:
            if not select.select([number], [], [], max(0.0, ends_s - time.monotonic()))[0]:
                return False
            read = os.read(number, 2**16)
            if not read:
                return False
            self.text += read
        return True

    def finish(self, limit_s: float) -> int | None:
        """Its exit status; None if it has to be killed."""
        try:
            rest, _ = self.process.communicate(timeout=limit_s)
            self.text += rest
        except subprocess.TimeoutExpired:
            end(self.process.pid)
            rest, _ = self.process.communicate()
            self.text += rest
            return None
        return self.process.returncode


def draw(seed: int, number: int) -> Interruption:
    """The interruption of this number: each combination of whom and what comes in turn."""
    cases = [
        (workers, whom, which)
        for workers, victims in ((1, ("parent", "group")), (2, ("parent", "group", "worker")))
        for whom in victims
        for which in SIGNALS
    ]
    random.Random(f"{seed}/interruptions").shuffle(cases)
    rng = random.Random(f"{seed}/interruptions/{number}")
    workers, whom, which = cases[number % len(cases)]
    again = which == signal.SIGINT and whom != "worker" and rng.random() < 0.5
    stage = rng.randrange(0, STAGES)
    return Interruption(
        workers,
        whom,
        which,
        stage,
        rng.uniform(0, 3) if stage else rng.uniform(1.5, 9),  # imports come first
        rng.uniform(0.2, 1) if again else None,
    )


def trial(work: Path, seed: int, number: int) -> Row:
    made = study.finished(work, "short", study.SHORT)
    planned = draw(seed, number)
    root = work / f"interruption-{number}"
    shutil.rmtree(root, ignore_errors=True)
    began_s = time.monotonic()
    try:
        found = _of(planned, made, root)
        if found[0] != OK:  # what it said is kept for whoever looks into it
            (work / f"interruption-{number}.log").write_text("\n\n".join(screens))
    finally:
        screens.clear()
        shutil.rmtree(root, ignore_errors=True)
    seconds = time.monotonic() - began_s
    target = f"{planned.whom} with {planned.workers} worker{'s' * (planned.workers > 1)}"
    return Row("interruptions", number, target, str(planned), *found[:2], seconds, 0, found[2])


def _of(planned: Interruption, made: study.Finished, root: Path) -> tuple[str, int | str, str]:
    """Verdict, exit code of the interrupted command, and the reason of the verdict."""
    arguments = ["run", str(made.study), "--out", str(root), "--workers", str(planned.workers)]
    watched = begin(arguments)
    watched.until(planned.stage, LIMIT_S)
    time.sleep(planned.delay_s)
    target = _target(planned, watched.process.pid, root)
    expected = _expected(planned, idle=planned.whom == "worker" and not runs_of(target, root))
    if not root.is_dir():
        expected.add(-planned.number)  # before the first line of the library was read
    if (root / made.name / "report.html").is_file():
        expected |= {0, -planned.number}  # too late to disturb anything
    struck = target > 0 and _strike(planned, target)
    limit_s: float = LIMIT_S
    if planned.second_s is not None:
        time.sleep(planned.second_s * busy())  # two signals that wait together are one
        struck = _strike(planned, target) or struck
        limit_s = SECOND_S * busy()
    code = watched.finish(limit_s)
    left = _left(watched.process.pid)
    text = watched.text.decode(errors="replace")
    screens.append(text)
    if code is None:
        return "stuck", "", f"still there {limit_s:.0f} s after the last signal: {_last(text)}"
    if left:
        end(watched.process.pid)
        return "left", code, f"{left} processes are still there: {_last(text)}"
    if TRACEBACK in text:
        return "traceback", code, _last(text)
    # One that had ended already, or had no worker at that moment, was not disturbed.
    if code not in (expected if struck else {0}):
        return "exit code", code, f"needs {sorted(expected)}: {_last(text)}"
    if planned.whom == "worker" and code == 1 and not any(n in _last(text, 12) for n in RUNS):
        return "unnamed", code, f"does not say which run it was: {_last(text)}"
    return _to_the_end(arguments, code, made, root)


screens: list[str] = []  # of the commands of a trial
RUNS = ("lora", "longer", "lokr", "twin")


def _to_the_end(
    arguments: list[str], code: int, made: study.Finished, root: Path
) -> tuple[str, int | str, str]:
    """The same command until the study is finished, and whether that is the undisturbed one."""
    retry = ["--retry-failed"] if code == 1 else []
    again = begin([*arguments, *retry])
    ended = again.finish(LIMIT_S)
    text = again.text.decode(errors="replace")
    screens.append(text)
    if ended != 0:
        return "unmended", code, f"then exit code {ended}: {_last(text)}"
    if other := study.differing(study.results(root), _sound(made)):
        return "silent", code, f"differs: {' '.join(other)}"
    if parts := [str(path.relative_to(root)) for path in root.rglob(".part-*")]:
        return "unswept", code, " ".join(parts)
    return OK, code, ""


def _expected(planned: Interruption, *, idle: bool) -> set[int]:
    """The exit codes that are right. `idle`: a worker between two runs, whom nobody need miss."""
    if planned.whom != "worker":
        return {CODES[planned.number]}
    # A worker alone that is asked to stop may save its state, or leave it to its parent to ask.
    asked = set() if planned.number == signal.SIGKILL else {0, CODES[planned.number]}
    return {1} | asked | ({0} if idle else set())


@cache
def _sound(made: study.Finished) -> dict[str, str]:
    return study.results(made.root)


def begin(arguments: list[str]) -> Watched:
    """Start a command that hears all signals: a shell's job in the background ignores some."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    process = subprocess.Popen(
        study.command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=study.environment() | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    return Watched(process)


def _target(planned: Interruption, leader: int, root: Path) -> int:
    """Whom to send the signal to, if to a worker to one that has a run; 0 if there is nobody."""
    if planned.whom != "worker":
        return leader
    found = sorted(workers(leader), key=lambda pid: (bool(runs_of(pid, root)), pid))
    return found[-1] if found else 0


def _strike(planned: Interruption, pid: int) -> bool:
    """Send the signal; False if there is nobody to send it to."""
    try:
        (os.killpg if planned.whom == "group" else os.kill)(pid, planned.number)
    except ProcessLookupError:
        return False
    return True


def runs_of(pid: int, root: Path) -> list[str]:
    """The folders of the runs that a process has locked."""
    found = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            path = Path(os.readlink(file))
            if path.name == ".lock" and path.parent.parent == root:
                found.append(path.parent.name)
    return found


def workers(parent: int) -> Iterator[int]:
    """The processes that a command has begun, but for multiprocessing's own helper."""
    for pid in session(parent):
        with contextlib.suppress(OSError):
            if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                yield pid


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == leader and fields[0] not in "ZX":
                    found.append(int(entry.name))
    return found


def _left(leader: int) -> int:
    """So many processes of the session are left after a while."""
    ends_s = time.monotonic() + LEFT_S * busy()
    while session(leader) and time.monotonic() < ends_s:
        time.sleep(0.1)
    return len(session(leader))


def busy() -> float:
    """How many times longer everything takes because of the machine's other work."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def end(leader: int) -> None:
    """Kill what is left of a session."""
    for pid in session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _last(text: str, lines: int = 2) -> str:
    return " | ".join(text.strip().splitlines()[-lines:])[:400]


KIND = Kind("interruptions", 60, trial)
