"""Processes that work side by side, each with its share of the processor's cores."""

import os
import threading
import time

from lyco_lab.console import set_log_level


def cores() -> int:
    """How many of the processor's cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS binds no process to cores


def begin(threads: int, parent: int) -> None:
    """Set a worker up: the threads it computes with, and the process that it dies with."""
    import torch  # here, as `cores` is asked without it

    set_log_level(None)
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
