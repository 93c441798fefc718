"""The screen: what users wrote is shown as it stands, tables are never cut, errors are one line.

Nothing printed here is read as Rich's markup or as an emoji: a question may hold `[/]` or `:x:`.
What is to be bold or coloured says so by a style.
"""

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lyco_lab.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LEVELS = ("error", "warning", "info", "debug")
LEVEL_VARIABLE = "LYCO_LAB_LOG_LEVEL"  # passes the level on to worker processes


def console() -> "Console":
    """The terminal, or what the output is redirected to."""
    from rich.console import Console

    # A pipe or a log has no width of its own, and 80 columns would be few.
    width = None if sys.stdout.isatty() else 120
    return Console(highlight=False, markup=False, emoji=False, width=width)


def show_table(
    screen: "Console", titles: Sequence[str], rows: Sequence[Sequence[str]], fixed: int = 1
) -> None:
    """Print a table; where the screen is too narrow, as several, with the first `fixed` columns in
    each. A column that does not fit even so is continued on the next line."""
    left = list(range(fixed, len(titles)))
    while left or fixed == len(titles):
        count = len(left)
        while count > 1 and _width(screen, titles, rows, fixed, left[:count]) > screen.width:
            count -= 1
        screen.print(_table(titles, rows, fixed, left[:count]))
        if not left[count:]:
            return
        left = left[count:]


def _table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], fixed: int, rest: Sequence[int]
) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    shown = [*range(fixed), *rest]
    high = max(titles[i].count("\n") for i in shown)
    for i in shown:
        title = "\n" * (high - titles[i].count("\n")) + titles[i]
        table.add_column(title, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(one_line(row[i]) for i in shown))
    return table


def _width(
    screen: "Console",
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    fixed: int,
    rest: Sequence[int],
) -> int:
    table = _table(titles, rows, fixed, rest)
    return table.__rich_measure__(screen, screen.options.update(max_width=10_000)).maximum


class Once(TyperCommand):
    """A command whose options are given once: of two, one would silently count for nothing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        seen = set()
        for option in order:
            repeated = getattr(option, "multiple", False)  # each counts
            if option.param_type_name == "option" and option.name in seen and not repeated:
                given = f"{option.opts[0]} is given twice: leave one out"
                raise typer.BadParameter(given, ctx=ctx)
            seen.add(option.name)
        return super().parse_args(ctx, args)


class Commands(TyperGroup):
    """The commands. A mistake in how one is called is one line and exit 2, as any other is."""

    def main(self, *args: Any, **options: Any) -> Any:
        if not options.pop("standalone_mode", True):
            return super().main(*args, **{**options, "standalone_mode": False})
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except Exception as error:
            if not hasattr(error, "format_message"):  # no error of the command line's own
                raise
            context = getattr(error, "ctx", None)
            if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
                typer.echo(context.get_help())
            else:
                path = getattr(context, "command_path", "lyco-lab")
                said = " ".join(str(error.format_message()).split()).rstrip(".")
                typer.echo(f"error: {one_line(said)} (see {path} --help)", err=True)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


def set_log_level(level: str | None) -> None:
    """From now on messages of this level and above go to stderr, those of libraries as well.

    None: what libraries say is kept off the screen.
    """
    level = level or os.environ.get(LEVEL_VARIABLE)
    if level is None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels not asked for
        return
    os.environ[LEVEL_VARIABLE] = level
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DIFFUSERS_VERBOSITY"] = level
    logging.basicConfig(
        level=level.upper(), format="%(levelname)s %(name)s: %(message)s", force=True
    )
