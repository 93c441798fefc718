"""Answers to SIGINT (Ctrl-C) and SIGTERM (Slurm, `docker stop`, systemd).

Both ask for the same: finish what would otherwise be lost, and end. A process exits with 128 plus
the signal's number, 130 or 143, as if the signal itself had ended it.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from lyco_lab.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
UNWINDING_S = 1.0  # after a second signal
AGAIN_S = 0.05  # after which a signal is sent again whose error Python has thrown away
Answer = Callable[[int], None]


class Stopped(KeyboardInterrupt):
    """One of the signals arrived where nothing has to be finished first."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def stop(number: int) -> None:
    raise Stopped(number)


def stop_at_once(number: int) -> None:
    raise Interrupted("stopped at once; the last checkpoint is kept", number)


def end_soon(number: int) -> None:
    """As `stop_at_once`, and whatever the unwinding waits for, the process ends within a second.

    Whoever catches the error is to call `end_now`: an ordinary exit waits for libraries, too.
    """
    global _hurried
    _hurried, number = True, _told or number  # the first decides about the exit code
    hard = threading.Timer(UNWINDING_S, os._exit, (exit_code(number),))
    hard.daemon = True
    hard.start()
    stop_at_once(number)


def end_now() -> None:
    """End the process, if it was told to end a second time."""
    if _hurried and _told:
        _exit(_told)


def ignore(number: int) -> None:
    """A process that was told once and will end needs no second signal."""


def end_between() -> None:
    """For a process of its own: before and after `answering`, a signal ends it with its exit code.

    After a first signal the interpreter takes a while to end. Near its end it gives the signals
    back to the system, for which a second Ctrl-C would be a death without an exit code. So it does
    not get that far: once all has been done that libraries have registered, the process ends.
    """
    atexit.register(_end_if_told)  # called after what is registered later
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end_between)


def _end_if_told() -> None:
    hold_back()
    if _told:
        _exit(_told)


def _end_between(number: int, _frame: FrameType | None) -> None:
    _exit(_told or number)


def _exit(number: int) -> NoReturn:
    """End here and now, with nothing said lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code(number))


_told = 0  # the signal that arrived first, within the outermost `answering`
_again: Answer = stop_at_once
_hurried = False
_ending = False  # this process hears no signal any more


def told() -> int:
    """The signal by which this process was told to end, or 0."""
    return _told


def again() -> Answer:
    """The present answer to a second signal."""
    return _again


@contextmanager
def answering(first: Answer, again: Answer | None = None) -> Iterator[None]:
    """Call `first` with the number of the first of the two signals, and `again` with later ones.

    Can be nested: the inner one decides about the first signal, and keeps the outer `again` unless
    it has its own. Signals that this process was started to ignore stay ignored (`nohup`, jobs in
    the background). Python runs handlers in the main thread only; elsewhere nothing changes.
    """
    global _told, _again
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        global _told
        if _told:
            _again(number)
        else:
            _told = number
            first(number)

    outer = _again
    if again is not None:
        _again = again
    before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
    outermost = not any(getattr(b, "__module__", None) == __name__ for b in before.values())
    for number in before:
        signal.signal(number, handle)
    others = sys.unraisablehook
    sys.unraisablehook = partial(_send_again, others)
    try:
        yield
    finally:
        sys.unraisablehook = others
        for number, handler in before.items() if not _ending else ():
            signal.signal(number, handler)
        _again = outer
        if outermost:
            _told = 0


def _send_again(others: Callable[[Any], object], unraisable: Any) -> None:
    """Send a signal again whose error was raised in a finalizer: Python throws such errors away.

    `others` has the errors that are none of a signal.
    """
    global _told
    error = unraisable.exc_value
    if not isinstance(error, Stopped | Interrupted):
        others(unraisable)
        return
    if isinstance(error, Stopped):
        _told = 0  # its answer is still the first
    main = threading.main_thread().ident
    later = threading.Timer(AGAIN_S, signal.pthread_kill, (main, error.number))
    later.daemon = True
    later.start()


@contextmanager
def blocked() -> Iterator[None]:
    """Hold the signals back, also in processes that are started meanwhile, until `unblock`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hold_back() -> None:
    """Hear no signal any more: for a process that is ending, whose libraries would tell of it.

    Ignoring them counts for all threads, as blocking would not, and Python leaves it so at its end.
    """
    global _ending
    _ending = True
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def exit_code(number: int) -> int:
    """130 for SIGINT, 143 for SIGTERM."""
    return 128 + number
