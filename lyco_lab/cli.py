"""The command line. What is heavy is imported by the command that needs it, and only then.

Exit codes: 0 done, 1 runs that failed or a claim that does not hold, 2 a mistake in what was asked
(one line on stderr), 130 and 143 interrupted by SIGINT (Ctrl-C) and by SIGTERM.
"""

import contextlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lyco_lab import interrupts
from lyco_lab.console import LEVELS, Commands, Once, console, set_log_level, show_table
from lyco_lab.errors import Interrupted, UserError, nearest, one_line

if TYPE_CHECKING:
    from rich.console import Console

    from lyco_lab.config import Study
    from lyco_lab.engines.local import Outcome
    from lyco_lab.states import Missing

log = logging.getLogger(__name__)
app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, generate, evaluate and compare adapters of Stable Diffusion.",
)
# What `verify` knows, said here as importing it takes seconds; a test compares.
ADAPTERS = (
    "boft, dora, dylora, glora, ia3, locon, loha, lokr, lokr-factored, lora, native, norm, oft, "
    "tlora, tucker"
)
OPTIMIZERS = (
    "adadelta, adafactor, adagrad, adam, adamax, adamw, adamw8bit, asgd, lion, muon, nadam, "
    "prodigy, radam, rmsprop, rprop, schedulefree, sgd"
)
Folder = Annotated[Path, typer.Option("--out", help="Where runs are kept.")]


@contextlib.contextmanager
def exit_codes(*, kept: bool = True) -> Iterator[None]:
    """A mistake is one line and exit 2; an interruption says how to go on and exits 130 or 143.

    `kept`: whether the same command goes on where it was interrupted.
    """
    with interrupts.answering(interrupts.stop, interrupts.end_soon), _exit_codes(kept):
        yield


@contextlib.contextmanager
def _exit_codes(kept: bool) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        log.debug("where the error comes from", exc_info=error)
        typer.echo(f"error: {one_line(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(2) from None
    except (KeyboardInterrupt, Interrupted) as error:
        said = f"{error}. " if isinstance(error, Interrupted) else ""
        command = shlex.join(["lyco-lab", *sys.argv[1:]])
        then = "What is done is kept; to go on" if kept else "To begin again"
        number = getattr(error, "number", signal.SIGINT)
        by = " by SIGTERM" if number == signal.SIGTERM else ""
        typer.echo(f"\ninterrupted{by}: {said}{then}: {command}", err=True)
        interrupts.end_now()
        raise typer.Exit(interrupts.exit_code(number)) from None


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("lyco-lab"))
        raise typer.Exit


def _log_level(level: str | None) -> str | None:
    if level is not None and level not in LEVELS:
        raise typer.BadParameter(
            f"{level!r}, needs one of {', '.join(LEVELS)}{nearest(level, LEVELS)}"
        )
    return level


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_version, help="Print the version alone."
        ),
    ] = False,
    log_level: Annotated[
        str | None,
        typer.Option(
            callback=_log_level,
            help=f"Messages to stderr, of libraries too: {', '.join(LEVELS)}. With debug, each "
            "file that is read or written, and where an error comes from.",
        ),
    ] = None,
) -> None:
    """Options of every command, given before its name."""
    set_log_level(log_level)


@app.command(cls=Once)
def run(
    study: Annotated[Path, typer.Argument(help="A study's folder, as experiments/demo.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value for every run, as train.steps=50.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")
    ] = False,
    wandb: Annotated[
        str | None, typer.Option(help="offline, online or disabled; short for wandb.mode=…")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time; one per core for the embedded model, else 1."),
    ] = None,
    fold: Annotated[
        bool,
        typer.Option("--fold/--no-fold", help="Train once what runs share, or each run by itself."),
    ] = True,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Runs of which the name matches, as 'lora-*'; can be given repeatedly."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many of the runs that are not done.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try runs again that failed before.")
    ] = False,
    out: Folder = Path("runs"),
) -> None:
    """Train, generate and evaluate what a study asks for, then compare. Skips what is done.

    A run fails alone: the others go on. Exits 1 if runs failed, 130 or 143 if it was interrupted.
    """
    with exit_codes():
        screen = console()
        loaded = _load(study, settings, wandb)
        from lyco_lab.engines.local import select

        chosen = tuple(select(loaded, only or ()))
        _show_plan(screen, replace(loaded, runs=chosen), out, full=dry_run, fold=fold)
        if dry_run:
            return
        from lyco_lab.engines.local import lacking, run_study, suggested_workers

        names = {each.name for each in chosen}
        try:
            outcome = run_study(
                loaded,
                out,
                screen.print,
                workers or suggested_workers(loaded),
                fold=fold,
                only=only or (),
                limit=limit,
                retry_failed=retry_failed,
            )
        except (KeyboardInterrupt, Interrupted):
            _show_failed([each for each in lacking(loaded, out) if each.name in names])
            raise
        _show_outcome(screen, loaded, outcome, out)
        if _show_failed([each for each in outcome.missing if each.name in names]):
            raise typer.Exit(1)


@app.command(cls=Once)
def report(
    study: Annotated[Path, typer.Argument(help="A study whose runs are done.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="The key=value it was run with.")
    ] = None,
    out: Folder = Path("runs"),
) -> None:
    """Write the tables and the page of a study again, from the folders of its runs.

    Runs that are not done are listed. Exits 1 if some of them failed, 2 if no run is done.
    """
    with exit_codes():
        from lyco_lab.engines.local import conclude

        loaded = _load(study, settings, None)
        outcome = conclude(loaded, out)
        if outcome.report is None:
            raise UserError(f"no run of {loaded.name!r} is evaluated in {out}: run the study first")
        _show_outcome(console(), loaded, outcome, out)
        if _show_failed(outcome.missing):
            raise typer.Exit(1)


@app.command(cls=Once)
def check(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Runs, by name or folder. [all of them]")
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Note the outputs of runs that an earlier version made.")
    ] = False,
    out: Folder = Path("runs"),
) -> None:
    """List what is damaged or missing of finished runs; to mend it, run their study again.

    Exits 1 if anything is.
    """
    with exit_codes(kept=False):
        from lyco_lab.data.caches import damaged
        from lyco_lab.data.stage import CACHE
        from lyco_lab.integrity import damage, records

        if adopt:
            from lyco_lab.adopt import adopt as note

            for line in note(out, runs or []):
                typer.echo(line)
        found = list(damage(out, runs or []))
        if not runs:
            found += [f"{file} is damaged; it is made anew" for file in damaged(out / CACHE)]
        for line in found:
            typer.echo(line)
        seen = len(records(out, runs or []))
        typer.echo(f"{seen} folders looked at, {len(found) or 'no'} faults")
        if found:
            raise typer.Exit(1)


@app.command(cls=Once)
def world(
    out: Annotated[Path, typer.Argument(help="A folder, new or written by this command before.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures of the pretraining world.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
) -> None:
    """Write the embedded world as folders of images, captions and manifests."""
    with exit_codes():
        from lyco_lab.miniature.export import write

        write(out, count, seed)
        typer.echo(f"{count} pictures in {out / 'world'}, and the concepts in {out / 'concepts'}")


@app.command(cls=Once)
def pretrain(
    out: Annotated[Path, typer.Argument(help="Where the weights and their quality table go.")],
    quick: Annotated[bool, typer.Option("--quick", help="The same code, for a minute.")] = False,
) -> None:
    """Make the embedded model and its judges from nothing. Goes on where it stopped."""
    with exit_codes():
        from lyco_lab.miniature.pretrain import pretrain as make
        from lyco_lab.miniature.pretrain.quality import as_text

        typer.echo(as_text(make(out, quick=quick)))


@app.command(cls=Once)
def verify(
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value of every run, as train.batch_size=2.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help=f"Of {ADAPTERS}; several as lora,locon. [lora]"),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help=f"Of {OPTIMIZERS}; several as adamw,lion. [adamw]")
    ] = None,
    gamma: Annotated[str, typer.Option(help="Numbers, as 2^-6,0.03.")] = "2^-12",
    dtype: Annotated[
        str | None, typer.Option(help="Of the frozen weights: fp32, bf16. [fp32]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The folder of a diffusers model.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of each training: 50 if not given.")
    ] = None,
    carry: Annotated[
        str, typer.Option(help="Which factors take the difference: all, or zero, those at 0.")
    ] = "all",
    keep: Annotated[
        str | None, typer.Option(help="A setting that is left as it is, as eps, to see its part.")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--all", help="Adapters x optimizers x dtypes; 10 minutes on 2 cores.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each case.")] = False,
    out: Annotated[Path | None, typer.Option(help="A CSV to write.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core.")] = None,
) -> None:
    """Train with two gammas, and see whether the theorem holds: bit for bit, or to rounding.

    Exits 1 when an equality that the theorem claims is not found.
    """
    with exit_codes(kept=False):
        from lyco_lab.verify.show import ask, show

        cases = ask(
            adapter, optimizer, gamma, dtype, model, steps, carry, keep, settings or [], whole
        )
        if not show(cases, console(), workers, as_json=as_json, out=out):
            raise typer.Exit(1)


@app.command(cls=Once)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One object of JSON.")] = False,
    out: Folder = Path("runs"),
) -> None:
    """Say what is here to work with, and what is missing for what. Needs and tries no network.

    Exits 1 when something that every run needs is broken.
    """
    from lyco_lab.doctor import as_json as written
    from lyco_lab.doctor import examine, show, works

    with exit_codes(kept=False):
        checks = examine(out)
        if as_json:
            typer.echo(written(checks))
        else:
            show(checks, console())
        if not works(checks):
            raise typer.Exit(1)


@app.command("import-config", cls=Once)
def import_config(
    file: Annotated[Path, typer.Argument(help="A training TOML of sd-scripts.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study to write. [its output_name]")
    ] = None,
    epoch_steps: Annotated[
        float | None,
        typer.Option(min=1, max=1e8, help="Steps of an epoch, if images cannot be counted."),
    ] = None,
) -> None:
    """Write the study that a training TOML describes, and list what it could not carry over."""
    with exit_codes(kept=False):
        from lyco_lab.import_config import import_config as write

        made = write(file, out, epoch_steps)
        typer.echo(f"{made.carried} settings in {made.study.folder / 'study.yaml'}")
        for title, found in (
            ("not carried over, or not whole", made.left),
            ("without effect here", made.idle),
        ):
            if found:
                typer.echo(f"{title}:")
            for key, why in found.items():
                typer.echo(f"  {key}: {why}")
        typer.echo("write its question and expectation, then: ", nl=False)
        typer.echo(f"lyco-lab run {shlex.quote(str(made.study.folder))} --dry-run")


def _load(study: Path, settings: list[str] | None, wandb: str | None) -> "Study":
    from lyco_lab.config import load_study

    overrides = list(settings or [])
    return load_study(study, overrides + ([f"wandb.mode={wandb}"] if wandb else []))


def _show_plan(screen: "Console", study: "Study", root: Path, *, full: bool, fold: bool) -> None:
    """Check every run, and say what it will do: a line, or a table of all."""
    from lyco_lab.costs import estimates
    from lyco_lab.dry_run import plan
    from lyco_lab.fold import Folding, folding, in_pairs
    from lyco_lab.lacking import lacking
    from lyco_lab.longer import starts

    lack = lacking(study) if full else None
    if lack is not None:
        study = lack.study
    plans = plan(study, lack.models, lack.images) if lack else plan(study)
    folded = folding(study, root) if fold else Folding(len(plans), len(plans))
    training = [p for p in plans if p.run.name not in folded.folds]
    begin = starts([p.run for p in training], root, in_pairs(study)) if fold else {}
    screen.print(study.name, style="bold", end="")
    screen.print(f": {one_line(study.question)}")
    screen.print(f"{folded.sentence} (in {root})", end="\n" if full else "; ")
    if begin:
        went = f"{len(begin)} go{'es' if len(begin) == 1 else ''} on from a shorter one"
        screen.print(went, end="\n" if full else "; ")
    params = sum(p.params for p in training)
    if not full:
        screen.print(f"{params:,} trained parameters in all")
        return
    columns = ["run", "layers", "parameters", "images x repeats", "steps x batch", "epochs", "done"]
    taken = {name: f"{each.source.name}, {each.how}" for name, each in folded.folds.items()}
    taken |= {name: each.sentence for name, each in begin.items()}
    columns += ["takes"] * bool(taken)
    rows = []
    for p in plans:
        train = p.run.train
        per_step, samples = train.samples_per_step, p.samples_per_epoch
        row = [
            p.run.name,
            " + ".join(f"{count} {part}" for part, count in p.layers.items()),
            f"{p.params:,}",
            f"{p.images} x {samples / p.images:g} = {samples}" if p.images else "?",
            f"{train.steps} x {per_step} = {train.steps * per_step}",
            f"{p.epochs:.3g}" if p.images else "?",
            ", ".join(p.stages_done(root)) or "-",
        ]
        rows.append(row + [taken.get(p.run.name, "")] * bool(taken))
    show_table(screen, columns, rows)
    for line in dict.fromkeys(line for p in plans for line in p.report):
        screen.print(line)
    screen.print(f"{params:,} trained parameters in all")
    for each in folded.folds.values():
        screen.print(each.sentence)
    narrowed = max(p.narrowed for p in plans)
    if narrowed:
        screen.print(
            f"up to {narrowed} of a run's layers are narrower than its rank: there the rank is "
            "what they allow, with the same gamma"
        )
    screen.print(f"expected: {one_line(study.expectation)}")
    for line in estimates(study, training, {name: each.steps for name, each in begin.items()}):
        screen.print(line)
    if lack:
        if lack.models:
            screen.print("layers and parameters are those of the model's family, by configuration")
        raise UserError(f"missing: {'; '.join(lack.said)}")


def _show_outcome(screen: "Console", study: "Study", outcome: "Outcome", root: Path) -> None:
    """The results as a table, the verdict on each pair, and where everything is."""
    if outcome.report is None:
        screen.print("no run is done, so there are no tables and no page")
        return
    results = outcome.results
    errors = [column for column in results if f"{column}_se" in results]
    titles = ["run", "concept", *(column.replace("_", "\n") for column in errors)]
    rows = [
        [str(row["run"]), str(row["concept"])]
        + ["-" if row[c] != row[c] else f"{row[c]:.3g}" for c in errors]
        for row in results.to_dict("records")
    ]
    show_table(screen, titles, rows, fixed=2)
    for verdict in outcome.verdicts:
        colour = "green" if verdict.equal else "red"
        screen.print("gamma pair", style=colour, end=" ")
        screen.print(verdict.sentence)
    for each in outcome.compared:
        colour = {True: "green", False: "red", None: "default"}[each.holds]
        screen.print("trained apart", style=colour, end=" ")
        screen.print(each.sentence)
    for sentence in outcome.unjudged:
        screen.print(f"gamma pair {sentence}")
    if waiting := [each.name for each in outcome.missing if each.failure is None]:
        screen.print(f"not done: {', '.join(waiting)}")
    if any(run.wandb.mode == "offline" for run in study.runs):
        screen.print(f"W&B, offline: to upload, wandb sync {root}/*/wandb/offline-run-*")
    screen.print(f"report: {outcome.report}")


def _show_failed(missing: "list[Missing]") -> bool:
    """List runs that failed on stderr; whether there are any."""
    failed = [each for each in missing if each.failure is not None]
    for each in failed:
        assert each.failure is not None
        said = f"{each.name} {each.sentence} (traceback: {each.failure.file})"
        typer.echo(one_line(said), err=True)
    if failed:
        which = "run" if len(failed) == 1 else "runs"
        typer.echo(
            f"error: {len(failed)} {which} failed; the same command with --retry-failed tries "
            f"{'it' if len(failed) == 1 else 'them'} again",
            err=True,
        )
    return bool(failed)


def main() -> None:
    """The entry point of `lyco-lab`."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    interrupts.end_between()
    app(prog_name="lyco-lab")
