"""A signal is never lost, and the process ends with its exit code whenever it comes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

IN_A_FINALIZER = """
import os, signal, time
from lyco_lab.interrupts import Stopped, answering, end_soon, stop

class Told:
    def __del__(self):
        os.kill(os.getpid(), {number})
        for _ in range(1000):  # the handler is called among these
            pass

with answering(stop, end_soon):
    try:
        Told()
        print("the error was thrown away", flush=True)
        time.sleep(30)
    except Stopped as error:
        raise SystemExit(128 + error.number)
"""

WHILE_IT_ENDS = """
import atexit, time
from lyco_lab import interrupts

interrupts.end_between()
if {late}:
    class Slow:  # as modules of a library, which go once Python has given the signals back
        sleep = time.sleep
        def __del__(self):
            self.sleep(2)
    slow = Slow()
    slow.sleep = time.sleep
else:
    atexit.register(time.sleep, 30)  # as libraries that have something to finish
with interrupts.answering(interrupts.stop, interrupts.end_soon):
    try:
        print("begun", flush=True)
        time.sleep(30)
    except interrupts.Stopped as error:
        print("stopped", flush=True)
        raise SystemExit(interrupts.exit_code(error.number))
"""


def begin(text: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_arrives_in_a_finalizer_is_not_lost(number):
    began_s = time.monotonic()
    process = begin(IN_A_FINALIZER.format(number=int(number)))
    stdout, stderr = process.communicate(timeout=60)
    assert "the error was thrown away" in stdout  # or this test has not tried it
    assert (process.returncode, stderr) == (128 + number, "")
    assert time.monotonic() - began_s < 25


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_the_interpreter_ends(first, late):
    process = begin(WHILE_IT_ENDS.format(late=late))
    assert process.stdout.readline() == "begun\n"
    process.send_signal(first)
    assert process.stdout.readline() == "stopped\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (128 + first, "")


def test_before_anything_is_answered():
    process = begin(
        "import time; from lyco_lab import interrupts; interrupts.end_between()\n"
        "print('begun', flush=True); time.sleep(30)"
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


A_WORKER = """
import atexit, os, signal
from lyco_lab.workers import supervise

def told():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass

def setup(say):
    atexit.register(told)
    return lambda task: task

if __name__ == "__main__":
    tasks = ["a"]
    supervise(1, 1, setup, lambda slot: tasks.pop() if tasks else None, print,
              lambda item: None, lambda number: None)
"""


def test_a_worker_that_is_ending_hears_nothing(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(A_WORKER)
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Done" in done.stdout
