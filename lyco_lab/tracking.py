"""What a run shows in W&B: a copy of what its folder holds, which remains the truth.

    project    the study, unless wandb.project names another
    group      the configuration without its seed, so that seeds are read together
    id         from the configuration: a stage that logs adds to the run that others began
    job_type   the stage

`offline` needs no account and no network, and asks for neither; `disabled` does not import wandb.
Everything is written inside the run's folder. Where a file lies on this machine is nobody's
business: paths are cut to their last part before they are shown.

The x-axis is `trainer/global_step`, a logged value like the others. W&B's own counter would drop
whatever a resumed run logs again.
"""

import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lyco_lab import settings
from lyco_lab.config import Run
from lyco_lab.errors import UserError
from lyco_lab.record import Record, digest

STEP = "trainer/global_step"
LONGEST_TAG, LONGEST_NAME = 64, 128  # characters that W&B takes
LIBRARIES = ("lyco-lab", "torch", "diffusers", "transformers", "lightning", "wandb")


@dataclass(frozen=True)
class Tracker:
    """One stage's open W&B run; with none, everything it is told is dropped."""

    wandb_run: Any | None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a training step: train/loss, lr/unet, …"""
        if self.wandb_run is not None:
            self.wandb_run.log({**values, STEP: step})

    def image(self, key: str, image_HWC: NDArray[np.uint8], caption: str, step: int = 0) -> None:
        """A picture, best a grid: each one is a file."""
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.log({key: wandb.Image(image_HWC, caption=caption), STEP: step})

    def summary(self, values: Mapping[str, Any]) -> None:
        """What the run came to: eval/<metric>, …"""
        if self.wandb_run is not None:
            self.wandb_run.summary.update(dict(values))

    def table(self, key: str, columns: list[str | int], rows: list[list[Any]]) -> None:
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.log({key: wandb.Table(columns=columns, data=rows)})

    def file(self, path: Path, name: str, kind: str) -> None:
        """A file as an artifact of type `kind`: model, dataset, generations or metrics."""
        if self.wandb_run is not None:
            import wandb

            artifact = wandb.Artifact(name[-LONGEST_NAME:], type=kind)
            # Uploaded from where it lies; W&B would keep a second copy in the home folder. The
            # path has to be absolute for that, and is in no manifest that leaves this machine.
            artifact.add_file(str(path.absolute()), policy="immutable", skip_cache=True)
            self.wandb_run.log_artifact(artifact, aliases=["latest"])


@contextmanager
def track(
    run: Run, record: Record, job_type: str, facts: Mapping[str, Any] | None = None
) -> Iterator[Tracker]:
    """W&B for the stage `job_type` of a run. `facts` join the configuration that it shows."""
    if run.wandb.mode == "disabled":
        yield Tracker(None)
        return
    import wandb

    online = run.wandb.mode == "online"
    try:
        wandb_run = wandb.init(
            project=run.wandb.project or run.study,
            id=run.hash,
            name=run.name,
            group=group(run),
            job_type=job_type,
            tags=[tag[:LONGEST_TAG] for tag in tags(run)],
            config=described(run, facts or {}),
            mode="online" if online else "offline",
            resume="allow" if online else None,  # offline, syncing joins folders of one id
            dir=record.path,
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,  # command line and paths; `described` says the rest
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"W&B cannot start with wandb.mode={run.wandb.mode}: {error}; "
            "log in with `wandb login`, or use --wandb offline"
        ) from error
    exit_code = 1
    try:
        wandb_run.define_metric("*", step_metric=STEP)
        yield Tracker(wandb_run)
        exit_code = 0
    finally:
        wandb_run.finish(exit_code=exit_code)


def group(run: Run) -> str:
    """One name for a configuration with whatever seed."""
    without_seed = {key: value for key, value in run.to_dict().items() if key != "seed"}
    return f"{run.adapter['kind']}-{digest(without_seed)}"


def tags(run: Run) -> list[str]:
    """Few, and never the only place a fact is in: W&B cannot group by them."""
    return [str(run.adapter["kind"]), run.model.preset, run.data.title]


def described(run: Run, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration and what surrounded it, in plain values."""
    config = settings.without_folders(run.to_dict(), Run)
    config |= {
        "config_hash": run.hash,
        "git": git_state(),
        "versions": {"python": platform.python_version(), **versions()},
        "host": platform.node(),
    }
    return config | dict(facts)


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout
            continue
    return found


def git_state() -> dict[str, Any]:
    """The commit of the library's checkout, and whether it was changed; {} outside of one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An ignored folder, as a virtual environment's, says nothing of the repository around it.
        if git("ls-files", Path(__file__).name) == "":
            return {}
        changed = git("status", "--porcelain", "--untracked-files=no") != ""
        return {"commit": git("rev-parse", "HEAD"), "dirty": changed}
    except (OSError, subprocess.CalledProcessError):
        return {}
