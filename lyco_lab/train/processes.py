"""One run trained by several processes, one for each device.

The process that the stage is called in is the first. It alone writes, prints, draws samples and
decides when to stop; the others follow it from the same state through the same steps, each with its
share of every batch, and what they find is averaged (Lightning's DDP strategy). They die with it,
and it with them.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from lyco_lab import progress
from lyco_lab.errors import UserError
from lyco_lab.interrupts import SIGNALS, unblock
from lyco_lab.workers import begin, start

HOST = "127.0.0.1"
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # environment variables that Lightning sets
GRACE_S = 30.0  # for the first to notice by itself that another has ended


@dataclass(frozen=True)
class Process:
    """One of `ranks`."""

    rank: int = 0
    ranks: int = 1
    port: int = 0  # where they meet

    @property
    def alone(self) -> bool:
        return self.ranks == 1


class Environment(LightningEnvironment):
    """Tells Lightning what there is, whatever cluster this machine is part of."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    @property
    def creates_processes_externally(self) -> bool:
        return not self._process.alone

    @property
    def main_address(self) -> str:
        return HOST

    @property
    def main_port(self) -> int:
        return self._process.port

    def world_size(self) -> int:
        return self._process.ranks

    def global_rank(self) -> int:
        return self._process.rank

    def local_rank(self) -> int:
        return self._process.rank

    def node_rank(self) -> int:
        return 0


Follow = Callable[..., Callable[[], None]]


@contextmanager
def together(ranks: int, follow: Follow, *arguments: Any) -> Iterator[Process]:
    """The first of `ranks` processes, while the others run.

    In each of those `follow(process, *arguments)` loads what it needs, and returns what is then
    called once all have got that far; both have to be found by their names in a new Python.
    """
    if ranks == 1:
        yield Process()
        return
    port, context = _free_port(), multiprocessing.get_context("spawn")
    others: list[BaseProcess] = []
    before = {name: os.environ.get(name) for name in ADDRESS}
    over = threading.Event()
    try:
        told = []
        for rank in range(1, ranks):
            ours, theirs = context.Pipe()
            process = Process(rank, ranks, port)
            given = (follow, process, torch.get_num_threads(), os.getpid(), theirs, arguments)
            others.append(context.Process(target=_other, args=given, daemon=True))
            start(others[-1])
            theirs.close()
            told.append(ours)
        for rank, (process_, ours) in enumerate(zip(others, told, strict=True), start=1):
            _wait_for(rank, process_, ours)
        threading.Thread(target=_watch, args=(others, over), daemon=True).start()
        try:
            yield Process(0, ranks, port)
        except RuntimeError as error:  # of a connection that was lost
            if lost := _ended_badly(others):
                raise UserError(lost) from error
            raise
        for process_ in others:
            process_.join(GRACE_S)
    finally:
        over.set()
        for process_ in others:
            process_.kill()  # one that waits for a message hears nothing else; it writes nothing
            process_.join()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _other(
    follow: Follow,
    process: Process,
    threads: int,
    parent: int,
    told: Connection,
    arguments: tuple[Any, ...],
) -> None:
    """What another process does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the first decides
    unblock()
    begin(threads, parent)
    progress.send_to(lambda news: None)
    try:
        go = follow(process, *arguments)
    except UserError as error:
        told.send(str(error))
        return
    told.send(None)
    try:
        go()
    except UserError:
        pass  # the first has the same, and says it
    except RuntimeError as error:
        # A connection is lost where another process ended, which has said why itself.
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise


def _wait_for(rank: int, process: BaseProcess, told: Connection) -> None:
    """Until it is as far as the first."""
    wait([told, process.sentinel])
    try:
        error = told.recv() if told.poll() else _lost(rank, process)
    except EOFError:
        process.join()
        error = _lost(rank, process)
    if error is not None:
        raise UserError(error)


def _watch(others: list[BaseProcess], over: threading.Event) -> None:
    """A GPU waits for another for ever: end if one is gone and nothing else has noticed."""
    while not over.wait(1.0):
        if lost := _ended_badly(others):
            if not over.wait(GRACE_S):
                print(f"error: {lost}", file=sys.stderr, flush=True)
                os._exit(1)
            return


def _ended_badly(others: list[BaseProcess]) -> str | None:
    deadline_s = time.monotonic() + 2  # a connection is lost before its process has quite ended
    while time.monotonic() < deadline_s:
        for rank, process in enumerate(others, start=1):
            if process.exitcode not in (None, 0):
                return _lost(rank, process)
        if all(process.exitcode is None for process in others):
            return None
        time.sleep(0.05)
    return None


def _lost(rank: int, process: BaseProcess) -> str:
    return (
        f"process {rank + 1} of those that train together ended with code {process.exitcode}: "
        "its message is above; the last checkpoint is kept"
    )


def agree(digest: bytes) -> bool:
    """Whether all processes have the same."""
    if not torch.distributed.is_initialized():
        return True
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, digest)
    return len(set(found)) == 1


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])
