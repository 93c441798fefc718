"""The command line in forked children of a process that has imported everything.

A child costs the work that it does and no imports, and whatever it does to itself, from a crash in
C to all of its memory, is seen from outside.
"""

import contextlib
import importlib
import io
import mmap
import os
import pkgutil
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import torch

import lyco_lab
from lyco_lab import cli

MIB = 2**20
MOST_MB = 4096  # of address space above the parent's; more is refused to a child
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Ending:
    """How a process ended."""

    code: int  # exit status; of one that a signal ended, minus its number
    out: str
    err: str
    seconds: float
    peak_mb: float  # largest resident memory above what it began with
    stuck: bool = False  # it had to be ended

    @property
    def fault(self) -> str:
        """What no command may do, in a word; "" if it did none of it."""
        if self.stuck:
            return "stuck"
        if self.code < 0:
            return "abort"
        return "traceback" if TRACEBACK in self.out + self.err else ""

    @property
    def said(self) -> list[str]:
        """The lines on stderr."""
        return [line for line in self.err.splitlines() if line.strip()]

    @property
    def one_line(self) -> bool:
        """Whether it told a mistake as one line."""
        return len(self.said) == 1 and self.said[0].startswith("error: ")

    @property
    def last_words(self) -> str:
        return " ".join((self.said or self.out.splitlines() or [""])[-1].split())[:300]


@cache
def warm(study: Path) -> None:
    """Import all that a child may need, by name and by a dry run of `study`; compute nothing.

    Torch refuses gradients in a child whose parent computed some.
    """
    torch.set_num_threads(1)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as the command line has it, but too late
    for module in pkgutil.walk_packages(lyco_lab.__path__, "lyco_lab."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("matplotlib.pyplot", "lightning.pytorch", "pandas.io.parquet"):
        importlib.import_module(name)
    from lyco_lab.config import load_study
    from lyco_lab.diffusion.model import load, quiet
    from lyco_lab.miniature import judges, placed

    with quiet():
        load(placed(load_study(study).runs[0].model))
        judges.load()
    given = sys.argv
    with tempfile.TemporaryDirectory() as nowhere, contextlib.redirect_stdout(io.StringIO()):
        _run_cli(("run", str(study), "--out", nowhere, "--dry-run"))
    sys.argv = given


def lyco(*arguments: str, limit_s: float = 120) -> Ending:
    """`lyco-lab ARGUMENTS` in a child."""
    return forked(lambda: _run_cli(arguments), limit_s)


def forked(call: Callable[[], int], limit_s: float) -> Ending:
    """`call` in a child, whose exit status it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        held = mmap.mmap(-1, 8)  # shared: what the child holds when it begins
        began_s = time.monotonic()
        with warnings.catch_warnings(action="ignore"):  # of threads, which no child relies on
            pid = os.fork()
        if pid == 0:
            _be_child(call, out.fileno(), err.fileno(), held)
        stuck = not _ends(pid, limit_s)
        if stuck:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
        seconds = time.monotonic() - began_s
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it may have begun and left
        said, complained = (_text(file) for file in (out, err))
    peak_mb = used.ru_maxrss / 1024 - int.from_bytes(held, "little") / MIB
    return Ending(os.waitstatus_to_exitcode(status), said, complained, seconds, peak_mb, stuck)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MIB).decode(errors="replace")


def _be_child(call: Callable[[], int], out: int, err: int, held: mmap.mmap) -> None:
    code = 70
    try:
        held[:] = _statm(1).to_bytes(8, "little")
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        most = _statm(0) + MOST_MB * MIB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run_cli(arguments: tuple[str, ...]) -> int:
    sys.argv = ["lyco-lab", *arguments]
    try:
        cli.main()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
    return 0


def _ends(pid: int, limit_s: float) -> bool:
    """Wait for a child; False if it is still there after so long."""
    number = os.pidfd_open(pid)
    try:
        return bool(select.select([number], [], [], limit_s)[0])
    finally:
        os.close(number)


def _statm(field: int) -> int:
    """Bytes of address space (0) or of resident memory (1)."""
    pages = int(Path("/proc/self/statm").read_text().split()[field])
    return pages * resource.getpagesize()
