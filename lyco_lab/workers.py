"""Processes that work side by side, each with its share of the processor's cores.

`supervise` gives tasks to processes, one at a time to each, and hears what becomes of them. A task
fails alone: by an error, or because its process was killed, after which a new process takes over.
"""

import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from lyco_lab import interrupts
from lyco_lab.errors import Interrupted, UserError
from lyco_lab.interrupts import Stopped, answering, blocked, hold_back, ignore, unblock

ENDING_S = 10.0  # for a process without a task to end by itself
ALONE_S = 1.0  # a signal for all may reach this process so much later than another
Say = Callable[[Any], None]
Work = Callable[[Any], Any]  # a task -> its result


@dataclass(frozen=True)
class Done:
    """A task that was carried out."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """A task that ended by an error, or together with its process."""

    reason: str  # on one line
    trace: str = ""
    mistake: bool = False  # of the user's

    @classmethod
    def by(cls, error: BaseException) -> "Failed":
        said = " ".join(str(error).split())
        name = type(error).__name__
        mistake = isinstance(error, UserError)
        reason = said if mistake else f"{name}: {said}" if said else name
        return cls(reason, "".join(traceback.format_exception(error)), mistake)


@dataclass(frozen=True)
class Halted:
    """A task that was stopped by a signal, and can be gone on with."""

    number: int
    said: str


End = Done | Failed | Halted


class _News(NamedTuple):
    item: Any


def cores() -> int:
    """How many of the processor's cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS binds no process to cores


def begin(threads: int, parent: int) -> None:
    """Set a worker up: the threads it computes with, and the process that it dies with."""
    import torch  # here, as `cores` is asked where nothing else may be installed

    from lyco_lab.console import set_log_level

    set_log_level(None)
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def start(process: BaseProcess) -> None:
    """Start a process that answers SIGINT and SIGTERM as it wants, once it calls `unblock`.

    Until then both are held back, so neither ends it while it imports what it needs.
    """
    resource_tracker.ensure_running()  # which itself would unblock the signals
    with blocked():
        process.start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def supervise(
    count: int,
    threads: int,
    setup: Callable[[Say], Work],
    take: Callable[[int], Any],
    ended: Callable[[int, Any, Done | Failed], None],
    heard: Callable[[Any], None] = lambda item: None,
    stopping: Callable[[int], None] = lambda number: None,
) -> None:
    """Carry out tasks in up to `count` processes until there are none left.

    take(slot)              the next task for the process of this number, None while there is none;
                            asked again whenever a task has ended
    setup(say)              called once in each process, which has `threads` threads; returns what
                            carries out a task. Both have to be found by their names in a new Python
    heard(item)             is called here with whatever a process gives to `say`
    ended(slot, task, end)  a task is done or has failed
    stopping(number)        this process was told to end: no new task begins, and the processes
                            finish their step

    Raises `Interrupted` once all have stopped after a signal. A second one kills them at once.
    """
    for _ in _Supervisor(count, threads, setup, take, ended, heard, stopping).turns():
        pass


def carry_out(
    count: int, threads: int, setup: Callable[[Say], Work], tasks: Sequence[Any]
) -> Iterator[Done | Failed]:
    """As `supervise`, for tasks that are known beforehand: how each ended, in that order."""
    waiting, ends = deque(tasks), deque[Done | Failed]()
    supervisor = _Supervisor(
        count,
        threads,
        setup,
        take=lambda slot: waiting.popleft() if waiting else None,
        ended=lambda slot, task, end: ends.append(end),
        heard=lambda item: None,
        stopping=lambda number: None,
    )
    for _ in supervisor.turns():
        while ends:
            yield ends.popleft()


@dataclass
class _Slot:
    """A place for a process, which works on `task`."""

    number: int
    process: BaseProcess | None = None
    pipe: Connection | None = None
    task: Any = None


class _Supervisor:
    def __init__(
        self,
        count: int,
        threads: int,
        setup: Callable[[Say], Work],
        take: Callable[[int], Any],
        ended: Callable[[int, Any, Done | Failed], None],
        heard: Callable[[Any], None],
        stopping: Callable[[int], None],
    ) -> None:
        self.slots = [_Slot(number) for number in range(count)]
        self.threads, self.setup = threads, setup
        self.take, self.ended, self.heard, self.stopping = take, ended, heard, stopping
        self.asked: int | None = None  # the signal that told this process to end
        self.said: list[str] = []  # by workers that were stopped
        self.context = get_context("spawn")
        self.awake, self._wake = self.context.Pipe(duplex=False)

    def turns(self) -> Iterator[None]:
        """All the work; whoever goes through this can look around whenever something has ended."""
        outer = interrupts.again()

        def first(number: int) -> None:
            self.asked = number
            self._wake.send_bytes(b"")  # `wait` goes on waiting after a signal

        def again(number: int) -> None:
            self.strike()  # without waiting for them
            outer(number)

        try:
            with answering(first, again):
                yield from self.work()
                self.shut()
            if self.asked is not None:
                kept = "; ".join(self.said) or "every run that was being worked on is kept"
                raise Interrupted(kept, self.asked)
        finally:
            self.kill()
            for connection in (self.awake, self._wake):
                connection.close()

    def work(self) -> Iterator[None]:
        told = False
        while True:
            if self.asked is None:
                for slot in self.slots:
                    if slot.task is None and (task := self.take(slot.number)) is not None:
                        self.give(slot, task)
            busy = [slot for slot in self.slots if slot.task is not None]
            if not busy:
                return
            if self.asked is not None and not told:
                told = True
                self.stopping(self.asked)
                self.forward(self.asked)
            self.wait([*([] if told else [self.awake]), *_watched(busy)])
            for slot in busy:
                self.listen(slot)
            yield

    def give(self, slot: _Slot, task: Any) -> None:
        slot.task = task
        if slot.process is None or not slot.process.is_alive():
            self.bury(slot)
            slot.pipe, theirs = self.context.Pipe()
            arguments = (theirs, self.threads, os.getpid(), self.setup)
            slot.process = self.context.Process(target=_serve, args=arguments)
            start(slot.process)
            theirs.close()
        assert slot.pipe is not None
        with suppress(OSError):  # it has just been killed, which `listen` finds
            slot.pipe.send(task)

    def listen(self, slot: _Slot) -> None:
        """All that a process has to say, and whether it is still there."""
        assert slot.process is not None and slot.pipe is not None
        gone = not slot.process.is_alive()  # asked first: what it sent before is there by then
        try:
            while slot.task is not None and slot.pipe.poll():
                message = slot.pipe.recv()
                if isinstance(message, _News):
                    self.heard(message.item)
                else:
                    self.end(slot, message)
        except (EOFError, OSError):
            slot.process.join()
            gone = True
        if gone:
            code = slot.process.exitcode
            self.bury(slot)
            if slot.task is not None:
                self.end(slot, Failed(lost(code)))

    def end(self, slot: _Slot, end: End) -> None:
        task = slot.task
        if isinstance(end, Halted) and self.asked is None:
            self.wait([self.awake], ALONE_S)
        slot.task = None
        if isinstance(end, Halted):
            if self.asked is not None:
                self.said.append(end.said)
                return
            if slot.process is not None:  # on its way out, and no place for the next task
                slot.process.join(ENDING_S)
                slot.process.kill()
                self.bury(slot)
            name = signal.Signals(end.number).name
            end = Failed(f"its process alone was told to end by {name}: {end.said}")
        elif isinstance(end, Failed) and not end.trace and self.asked is not None:
            return  # its process did not survive the signal; nothing is known against the task
        self.ended(slot.number, task, end)

    def forward(self, number: int) -> None:
        """Tell the workers: only this process may have been told. They hear it once."""
        for slot in self.slots:
            if slot.process is not None and slot.process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(slot.process.pid, number)

    def wait(self, objects: list[Any], timeout_s: float | None = None) -> None:
        if self.awake in wait(objects, timeout_s):
            self.awake.recv_bytes()

    def shut(self) -> None:
        """Let the processes end."""
        for slot in self.slots:
            if slot.pipe is not None:
                with suppress(OSError):
                    slot.pipe.send(None)
        deadline_s = time.monotonic() + ENDING_S
        for slot in self.slots:
            if slot.process is not None:
                slot.process.join(max(0.0, deadline_s - time.monotonic()))

    def strike(self) -> None:
        for slot in self.slots:
            if slot.process is not None and slot.process.pid is not None:
                slot.process.kill()

    def kill(self) -> None:
        self.strike()
        for slot in self.slots:
            self.bury(slot)

    def bury(self, slot: _Slot) -> None:
        """Forget a process that has ended or is about to."""
        process, pipe = slot.process, slot.pipe
        slot.process = slot.pipe = None
        if process is not None and process.pid is not None:
            process.join()
            process.close()
        if pipe is not None:
            pipe.close()


def _watched(slots: list[_Slot]) -> list[Any]:
    found: list[Any] = []
    for slot in slots:
        if slot.process is not None:
            found += [slot.pipe, slot.process.sentinel]
    return found


def lost(code: int | None) -> str:
    """Why a process is gone, by its exit code."""
    if code is None or code >= 0:
        return f"its process ended with code {code} before it was done: its message is above"
    if code == -signal.SIGKILL:
        return (
            "its process was killed by signal 9 (SIGKILL), most likely because memory ran out: "
            "use fewer --workers"
        )
    known = {number.value: number.name for number in signal.Signals}
    return f"its process was ended by signal {-code} ({known.get(-code, 'unknown')})"


def _serve(pipe: Connection, threads: int, parent: int, setup: Callable[[Say], Work]) -> None:
    """What a worker process does: a task at a time, until there are no more."""
    desk = _Desk(pipe)
    with answering(desk.told, ignore):
        unblock()
        begin(threads, parent)
        desk.serve(setup)
        hold_back()


class _Desk:
    """A worker's end of its pipe. A signal never cuts a message in two."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.lock = threading.Lock()  # a message may come from a thread beside
        self.number: int | None = None  # of the signal that told this process to end
        self.interruptible = False  # whether an exception is in place here

    def told(self, number: int) -> None:
        self.number = number
        if self.interruptible:
            raise Stopped(number)

    def say(self, item: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            with self.lock:
                self.pipe.send(_News(item))
            return
        before, self.interruptible = self.interruptible, False
        with self.lock:
            self.pipe.send(_News(item))
        self.interruptible = before
        if before and self.number is not None:
            raise Stopped(self.number)

    def serve(self, setup: Callable[[Say], Work]) -> None:
        work: Work | None = None
        while True:
            try:
                self.interruptible = self.number is None
                self.pipe.poll(None)
            except Stopped:
                return
            finally:
                self.interruptible = False
            try:
                task = self.pipe.recv()
            except EOFError:
                return
            if task is None:
                return
            end: End
            try:
                self.interruptible = True
                if self.number is not None:
                    raise Stopped(self.number)
                if work is None:
                    work = setup(self.say)
                end = Done(work(task))
            except BaseException as error:
                self.interruptible = False
                end = _end(error)
            finally:
                self.interruptible = False
            with self.lock:
                self.pipe.send(end)
            if isinstance(end, Halted):
                return


def _end(error: BaseException) -> End:
    if isinstance(error, (Interrupted, KeyboardInterrupt)) or interrupts.told():
        number = getattr(error, "number", interrupts.told() or signal.SIGINT)
        return Halted(number, str(error) if isinstance(error, Interrupted) else "stopped")
    return Failed.by(error)
