"""The command line. What is heavy is imported by the command that needs it, and only then.

Exit codes: 0 done, 2 a mistake in what was asked (one line on stderr), 130 interrupted.
"""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lyco_lab.errors import Interrupted, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from lyco_lab.config import Study
    from lyco_lab.engines.local import Outcome

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, generate, evaluate and compare adapters of Stable Diffusion.",
)
Folder = Annotated[Path, typer.Option("--out", help="Where runs are kept.")]


@contextlib.contextmanager
def exit_codes(*, kept: bool = True) -> Iterator[None]:
    """A mistake is one line and exit 2; an interruption says how to go on and exits 130.

    `kept`: whether the same command goes on where it was interrupted.
    """
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    except (KeyboardInterrupt, Interrupted) as error:
        said = f"{error}. " if isinstance(error, Interrupted) else ""
        command = shlex.join(["lyco-lab", *sys.argv[1:]])
        then = "What is done is kept; to go on" if kept else "To begin again"
        typer.echo(f"\ninterrupted: {said}{then}: {command}", err=True)
        raise typer.Exit(130) from None


@app.command()
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
    out: Folder = Path("runs"),
) -> None:
    """Train, generate and evaluate what a study asks for, then compare. Skips what is done."""
    with exit_codes():
        console = _console()
        loaded = _load(study, settings, wandb)
        _show_plan(console, loaded, out, full=dry_run, fold=fold)
        if dry_run:
            return
        from lyco_lab.engines.local import run_study, suggested_workers

        workers = workers or suggested_workers(loaded)
        outcome = run_study(loaded, out, console.print, workers, fold=fold)
        _show_outcome(console, loaded, outcome, out)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="A study whose runs are done.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="The key=value it was run with.")
    ] = None,
    out: Folder = Path("runs"),
) -> None:
    """Write the tables and the page of a finished study again, from its runs' folders."""
    with exit_codes():
        from lyco_lab.engines.local import conclude

        loaded = _load(study, settings, None)
        _show_outcome(_console(), loaded, conclude(loaded, out), out)


@app.command()
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


@app.command()
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


@app.command()
def pretrain(
    out: Annotated[Path, typer.Argument(help="Where the weights and their quality table go.")],
    quick: Annotated[bool, typer.Option("--quick", help="The same code, for a minute.")] = False,
) -> None:
    """Make the embedded model and its judges from nothing. Goes on where it stopped."""
    with exit_codes():
        from lyco_lab.miniature.pretrain import pretrain as make
        from lyco_lab.miniature.pretrain.quality import as_text

        typer.echo(as_text(make(out, quick=quick)))


@app.command()
def verify(
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value of every run, as train.batch_size=2.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Names, as lora,locon,loha: lora alone if not given.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="Likewise: adamw if not given.")] = None,
    gamma: Annotated[str, typer.Option(help="Numbers, as 2^-6,0.03.")] = "2^-12",
    dtype: Annotated[str | None, typer.Option(help="Of the frozen weights: fp32,bf16.")] = None,
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
        if not show(cases, _console(), workers, as_json=as_json, out=out):
            raise typer.Exit(1)


@app.command()
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
            show(checks, _console())
        if not works(checks):
            raise typer.Exit(1)


@app.command("import-config")
def import_config(
    file: Annotated[Path, typer.Argument(help="A training TOML of sd-scripts.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study to write. [its output_name]")
    ] = None,
    epoch_steps: Annotated[
        float | None,
        typer.Option(min=1, help="Steps of an epoch, where the images cannot be counted."),
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


def _console() -> "Console":
    from rich.console import Console

    # A pipe or a log has no width of its own, and 80 columns would cut the tables.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _show_plan(console: "Console", study: "Study", root: Path, *, full: bool, fold: bool) -> None:
    """Check every run, and say what it will do: a line, or a table of all."""
    from rich.table import Table

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
    console.print(f"[bold]{study.name}[/]: {study.question}")
    console.print(f"{folded.sentence} (in {root})", end="\n" if full else "; ")
    if begin:
        went = f"{len(begin)} go{'es' if len(begin) == 1 else ''} on from a shorter one"
        console.print(went, end="\n" if full else "; ")
    params = sum(p.params for p in training)
    if not full:
        console.print(f"{params:,} trained parameters in all")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True)
    columns = ["layers", "parameters", "images x repeats", "steps x batch", "epochs", "done"]
    taken = {name: f"{each.source.name}, {each.how}" for name, each in folded.folds.items()}
    taken |= {name: each.sentence for name, each in begin.items()}
    for title in columns + ["takes"] * bool(taken):
        table.add_column(title, justify="right")
    for p in plans:
        train = p.run.train
        table.add_row(
            p.run.name,
            " + ".join(f"{count} {part}" for part, count in p.layers.items()),
            f"{p.params:,}",
            f"{p.images} x {p.samples_per_epoch / p.images:g} = {p.samples_per_epoch}"
            if p.images
            else "?",
            f"{train.steps} x {train.samples_per_step} = {train.steps * train.samples_per_step}",
            f"{p.epochs:.3g}" if p.images else "?",
            ", ".join(p.stages_done(root)) or "-",
            *([taken.get(p.run.name, "")] if taken else []),
        )
    console.print(table)
    for line in dict.fromkeys(line for p in plans for line in p.report):
        console.print(line, markup=False)
    console.print(f"{params:,} trained parameters in all")
    for each in folded.folds.values():
        console.print(each.sentence)
    narrowed = max(p.narrowed for p in plans)
    if narrowed:
        console.print(
            f"up to {narrowed} of a run's layers are narrower than its rank: there the rank is "
            "what they allow, with the same gamma"
        )
    console.print(f"expected: {study.expectation}")
    for line in estimates(study, training, {name: each.steps for name, each in begin.items()}):
        console.print(line)
    if lack:
        if lack.models:
            console.print("layers and parameters are those of the model's family, by configuration")
        raise UserError(f"missing: {'; '.join(lack.said)}")


def _show_outcome(console: "Console", study: "Study", outcome: "Outcome", root: Path) -> None:
    """The results as a table, the verdict on each pair, and where everything is."""
    from rich.table import Table

    results = outcome.results
    errors = [column for column in results if f"{column}_se" in results]
    table = Table(box=None, pad_edge=False)
    table.add_column("\n\nrun", no_wrap=True)
    for column in ("concept", *errors):
        table.add_column(column.replace("_", "\n"), justify="right", vertical="bottom")
    for row in results.to_dict("records"):
        cells = ["-" if row[c] != row[c] else f"{row[c]:.3g}" for c in errors]
        table.add_row(str(row["run"]), str(row["concept"]), *cells)
    console.print(table)
    for verdict in outcome.verdicts:
        colour = "green" if verdict.equal else "red"
        console.print(f"[{colour}]gamma pair[/] {verdict.sentence}")
    for each in outcome.compared:
        colour = {True: "green", False: "red", None: "default"}[each.holds]
        console.print(f"[{colour}]trained apart[/] {each.sentence}")
    if any(run.wandb.mode == "offline" for run in study.runs):
        console.print(f"W&B, offline: to upload, wandb sync {root}/*/wandb/offline-run-*")
    console.print(f"report: {outcome.report}")


def main() -> None:
    """The entry point of `lyco-lab`. What libraries say of themselves is kept off the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels not asked for
    app(prog_name="lyco-lab")
