"""The command: what was asked -> cases, and a line for each as it is done."""

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lyco_lab import progress
from lyco_lab.errors import UserError
from lyco_lab.files import writing
from lyco_lab.verify import case, table
from lyco_lab.verify.case import Case
from lyco_lab.verify.verdict import NONE
from lyco_lab.verify.work import verify

if TYPE_CHECKING:
    from rich.console import Console


def ask(
    adapter: str | None,
    optimizer: str | None,
    gamma: str,
    dtype: str | None,
    model: str | None,
    steps: int | None,
    carry: str,
    keep: str | None,
    settings: Iterable[str],
    whole: bool,
) -> list[Case]:
    """The cases that the options of the command ask for."""
    named = {"model.path": model, "train.steps": steps}
    settings = [*settings, *(f"{key}={value}" for key, value in named.items() if value is not None)]
    return case.cases(
        _words(adapter, case.ADAPTERS if whole else ("lora",)),
        _words(optimizer, case.OPTIMIZERS if whole else ("adamw",)),
        [case.parse_gamma(text) for text in _words(gamma, ())],
        _words(dtype, ("fp32", "bf16") if whole else ("fp32",)),
        carry=carry,
        keep=keep,
        settings=settings,
    )


def _words(text: str | None, default: Sequence[str]) -> list[str]:
    words = default if text is None else [word.strip() for word in text.split(",")]
    return list(dict.fromkeys(word for word in words if word))


def show(
    cases: Sequence[Case],
    console: "Console",
    workers: int | None,
    *,
    as_json: bool,
    out: Path | None,
) -> bool:
    """Try the cases and say what was found; whether every claim holds."""
    if not cases:
        raise UserError("nothing to verify: --adapter, --optimizer, --gamma and --dtype name none")
    if out is not None:
        _check_writable(out)  # not after the work
    rows: dict[int, table.Row] = {}
    with ExitStack() as stack:
        screen, say = None, console.print
        if console.is_terminal and not as_json:
            screen = stack.enter_context(progress.columns())
            say, task = screen.console.print, screen.add_task("verify", total=len(cases), note="")
        for place, row in verify(cases, workers):
            rows[place] = row
            if as_json:
                print(table.as_json(row), flush=True)
            else:
                say(row.line, soft_wrap=True, markup=False)
            if screen is not None:
                screen.advance(task)
    found = [rows[place] for place in sorted(rows)]
    if not as_json and len(found) > 1:
        _show_grid(found, console)
    if out is not None:
        table.write(out, found)
    refused = [row for row in found if row.verdict == NONE]
    if refused:
        raise UserError(f"{len(refused)} of {len(found)} cases could not be run: {refused[0].line}")
    return all(row.holds for row in found)


def _show_grid(rows: Sequence[table.Row], console: "Console") -> None:
    from rich.table import Table

    titles, lines = table.grid(rows)
    shown = Table(box=None, pad_edge=False)
    for title in titles:
        shown.add_column(title)
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    console.print(table.summary(rows))


def _check_writable(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"--out is {str(out)!r}, which is a folder: give the CSV a name in it")
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
