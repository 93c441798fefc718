"""Processes that work side by side, each with its share of the processor's cores."""

import logging
import os
import threading
import time

import torch


def begin(threads: int, parent: int) -> None:
    """Set a worker up: the threads it computes with, and the process that it dies with."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels not asked for
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
