"""Tasks fail alone, a signal stops all processes that carry them out, and none is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest

from lyco_lab.errors import Interrupted, UserError
from lyco_lab.workers import Done, Failed, cores, lost, supervise

ROOT = Path(__file__).parents[1]


def setup(say):
    """A worker whose tasks are words."""

    def work(task):
        say(f"{task} by {os.getpid()}")
        word, _, number = task.partition(" ")
        if word == "kill":
            os.kill(os.getpid(), int(number))
        if word in ("kill", "wait"):
            time.sleep(60)
        if word == "fail":
            raise UserError("of the user")
        if word == "bug":
            raise ZeroDivisionError("a bug")
        if word == "exit":
            os._exit(3)
        return task.upper()

    return work


class Boss:
    def __init__(self, tasks, on_news=lambda item: None):
        self.tasks, self.ends, self.news, self.told = deque(tasks), {}, [], []
        self.on_news = on_news

    def take(self, slot):
        return self.tasks.popleft() if self.tasks else None

    def ended(self, slot, task, end):
        self.ends[task] = end

    def heard(self, item):
        self.news.append(item)
        self.on_news(item)

    def run(self, count=2):
        supervise(count, 1, setup, self.take, self.ended, self.heard, self.told.append)
        return self.ends


def pid_of(item):
    return int(item.split()[-1])


def gone(pid, within_s=10.0):
    """Whether a process ends, as it does with its parent."""
    deadline_s = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def ends():
    boss = Boss(["a", f"kill {signal.SIGKILL}", "b", "fail", "bug", f"kill {signal.SIGTERM}", "c"])
    return boss.run(), boss


def test_what_fails_fails_alone(ends):
    found, boss = ends
    assert {task: found[task] for task in "abc"} == {t: Done(t.upper()) for t in "abc"}
    assert found["fail"].reason == "of the user" and "raise UserError" in found["fail"].trace
    assert found["bug"].reason == "ZeroDivisionError: a bug"
    assert len(found) == len(boss.news) == 7
    pids = {pid_of(item) for item in boss.news}
    assert 3 <= len(pids) <= 4 and all(map(gone, pids))


def test_a_process_that_is_killed_is_replaced_and_the_likely_cause_is_named(ends):
    killed = ends[0][f"kill {signal.SIGKILL}"]
    assert killed == Failed(lost(-9)) and "signal 9 (SIGKILL)" in killed.reason
    assert "fewer --workers" in killed.reason
    assert "signal 11 (SIGSEGV)" in lost(-11) and "code 3" in lost(3)


def test_a_process_that_alone_is_told_to_end_is_a_failure(ends):
    told = ends[0][f"kill {signal.SIGTERM}"]
    assert isinstance(told, Failed) and "alone was told to end by SIGTERM" in told.reason


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_stops_all_and_nothing_new_begins(number):
    waiting = []

    def both(item):
        waiting.append(pid_of(item))
        if len(waiting) == 2:
            os.kill(os.getpid(), number)

    boss = Boss(["wait 1", "wait 2", "never"], both)
    began_s = time.monotonic()
    with pytest.raises(Interrupted) as raised:
        boss.run()
    assert raised.value.number == number and boss.told == [number]
    assert boss.ends == {} and list(boss.tasks) == ["never"]
    assert time.monotonic() - began_s < 50 and all(map(gone, waiting))
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


STUBBORN = """
import os, signal, sys, time
from lyco_lab.interrupts import answering, end_now, end_soon, stop
from lyco_lab.workers import supervise

def setup(say):
    def work(task):
        say(os.getpid())
        with answering(lambda number: None):  # as a step that does not end
            time.sleep(100)
    return work

if __name__ == "__main__":
    tasks = ["a", "b"]
    with answering(stop, end_soon):  # as the command line
        try:
            supervise(2, 1, setup, lambda slot: tasks.pop() if tasks else None, print,
                      lambda item: print(item, flush=True),
                      lambda number: print("stopping", flush=True))
        finally:
            end_now()
"""


@pytest.mark.parametrize(
    "group", [pytest.param(False, marks=pytest.mark.slow), True], ids=["parent", "group"]
)
def test_a_second_signal_ends_everything_at_once(tmp_path, group):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    process = subprocess.Popen(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    send = os.killpg if group else os.kill
    pids = [int(process.stdout.readline()) for _ in range(2)]
    send(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "stopping\n"
    began_s = time.monotonic()
    send(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - began_s < 5, stderr  # 0.3 on a machine that is not busy
    assert process.returncode == 130  # by the first
    assert all(map(gone, pids))


@pytest.mark.slow
def test_workers_die_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    process = subprocess.Popen(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.communicate()
    assert all(map(gone, pids))


def test_cores_are_those_that_this_process_may_use():
    found = []

    def count():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of this thread alone
        found.append(cores())

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    assert found == [1] and cores() == len(os.sched_getaffinity(0))
