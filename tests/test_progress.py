"""Bars count what is done, here or for another process."""

import time

import pytest

from lyco_lab import progress
from lyco_lab.progress import Bar, News, track


@pytest.fixture
def heard():
    news = []
    progress.send_to(news.append)
    yield news
    progress.send_to(None)


def test_a_listener_hears_every_step(heard):
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert heard == [News("letters", done, 3, "") for done in range(4)]


def test_a_bar_that_goes_on_begins_where_it_was(heard):
    with Bar("steps", total=5, done=3) as bar:
        bar.advance("loss 0.1")
    assert heard == [News("steps", 3, 5, ""), News("steps", 4, 5, "loss 0.1")]


def test_without_a_listener_it_is_drawn(capsys):
    assert sum(track([1, 2, 3], "numbers")) == 6
    assert "numbers" in capsys.readouterr().out


def test_an_error_inside_ends_the_bar(capsys):
    with pytest.raises(ZeroDivisionError):
        for number in track([1, 0], "numbers"):
            1 / number
    assert "1/2" in capsys.readouterr().out


def test_time_left_is_said_where_it_is_known_alone():
    """Rich's own guess goes by the stages that are done, which take other times than the rest."""
    with progress.columns() as screen:
        for ends_s in (None, time.monotonic() + 75.4, time.monotonic() - 9):
            screen.add_task("all", total=9, completed=4, note="", ends_s=ends_s)
        *_, left = screen.columns
        said = [str(left.render(task)) for task in screen.tasks]
    assert said == ["", "about 1:15 left", "about 0:00 left"]


def test_minutes():
    assert [progress.minutes(s) for s in (0.4, 59.6, 75, 3600)] == ["0:00", "1:00", "1:15", "60:00"]


def test_what_a_run_is_called_is_no_markup(capsys):
    with Bar("[red]lora[/]: train", 1) as bar:
        bar.advance("[/]")
    assert "[red]lora[/]: train" in capsys.readouterr().out
