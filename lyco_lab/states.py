"""What has become of a run: each stage is done, running, failed or still waiting.

    done/STAGE.json     the stage is done (lyco_lab/record.py)
    .lock               held by the process that is working on the run, and names it
    failed/STAGE.txt    why the stage failed: the error on the first line, then when and by which
                        command, then the traceback

A lock ends with its process, so a run that was killed is waiting again and not running for ever. A
failure counts until its stage is done or is to be tried again.
"""

import os
import platform
import shlex
import shutil
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lyco_lab.errors import UserError
from lyco_lab.files import atomic, owner
from lyco_lab.record import STAGES, Record

FAILED = "failed"


@dataclass(frozen=True)
class Failure:
    """Of one stage of a run."""

    stage: str
    reason: str  # on one line
    file: Path


@dataclass(frozen=True)
class Missing:
    """A run without results, and why."""

    name: str
    stage: str  # the first that is not done
    failure: Failure | None = None
    running: str = ""  # by whom
    damage: str = ""  # of what says that the stage is done

    @property
    def sentence(self) -> str:
        """Without the name of the run."""
        if self.failure is not None:
            return f"failed in {self.failure.stage}: {self.failure.reason}"
        if self.running:
            return f"{self.stage} is running ({self.running})"
        if self.damage:
            return f"{self.stage} is not known to be done: {self.damage}"
        return f"{self.stage} is not done"


def failure(record: Record) -> Failure | None:
    """The failure of the stage that is next, if that has failed."""
    stage = next((stage for stage in STAGES if not record.settled(stage)), None)
    file = record.path / FAILED / f"{stage}.txt"
    if stage is None or not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return Failure(stage, lines[0] if lines else "for an unknown reason", file)


def missing(name: str, record: Record) -> Missing | None:
    """What a run lacks that failed or has stages that are not done; None for any other."""
    failed = failure(record)
    if failed is not None:
        return Missing(name, failed.stage, failed)
    stage = next((stage for stage in STAGES if not record.done(stage)), None)
    if stage is None:
        return None
    return Missing(name, stage, None, owner(record.path), _damage(record, stage))


def _damage(record: Record, stage: str) -> str:
    if record.mark_file(stage).is_file():
        try:
            record.mark(stage)
        except UserError as error:
            return " ".join(str(error).split())
    return ""


def fail(record: Record, stage: str, reason: str, trace: str) -> Failure:
    """Write down that a stage failed."""
    file = record.path / FAILED / f"{stage}.txt"
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    command = shlex.join(["lyco-lab", *sys.argv[1:]])
    lines = [
        reason,
        "",
        f"stage: {stage}",
        f"time: {now}",
        f"process: {os.getpid()} on {platform.node()}",
        f"command: {command}",
        "",
        trace,
    ]
    with atomic(file) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    return Failure(stage, reason, file)


def forgive(record: Record) -> None:
    """Forget failures, before the run is tried again."""
    shutil.rmtree(record.path / FAILED, ignore_errors=True)
