"""How far a long stage is, and how long the rest takes.

A stage opens a `Bar` and advances it, and knows nothing of screens. In the process that owns the
terminal it is drawn there; in a worker process (see engines/) its news travel to that one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class News(NamedTuple):
    """One bar's state. `done == total` is its last."""

    title: str
    done: int
    total: int
    note: str


_listener: Callable[[News], None] | None = None


def send_to(listener: Callable[[News], None] | None) -> None:
    """From now on this process's bars are `listener`'s to show; None: the terminal's."""
    global _listener
    _listener = listener


@dataclass
class Bar:
    """`total` equal steps, of which `done` are. Use as a context."""

    title: str
    total: int
    done: int = 0

    def __enter__(self) -> "Bar":
        self._screen = None
        if _listener is None:
            self._screen = columns()
            self._task = self._screen.add_task(
                self.title, total=self.total, completed=self.done, note=""
            )
            self._screen.start()
        else:
            _listener(News(self.title, self.done, self.total, ""))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._screen is not None:
            self._screen.stop()

    def advance(self, note: str = "") -> None:
        self.done += 1
        if self._screen is not None:
            self._screen.update(self._task, completed=self.done, note=note)
        elif _listener is not None:
            _listener(News(self.title, self.done, self.total, note))


def track(items: Sequence[T], title: str) -> Iterator[T]:
    """The items, with a bar that moves as each is done with."""
    with Bar(title, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()


def columns():  # type: ignore[no-untyped-def]
    """A rich Progress in this project's form: title, bar, count, note, time left.

    A task with a field `ends_s` knows when it will end, by `time.monotonic`, and None says nothing:
    of stages that take different times, those that are done do not tell how long the others take.
    """
    from rich.progress import (  # here, since the command line is imported without it
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Left(TimeRemainingColumn):
        max_refresh = None

        def render(self, task: Task) -> Text:
            if "ends_s" not in task.fields:
                return super().render(task)
            ends_s = task.fields["ends_s"]
            if ends_s is None:
                return Text("")
            left_s = max(0.0, ends_s - time.monotonic())
            return Text(f"about {minutes(left_s)} left", style="progress.remaining")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        Left(),
        refresh_per_second=2,
    )


def minutes(seconds: float) -> str:
    """75 -> '1:15'."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
