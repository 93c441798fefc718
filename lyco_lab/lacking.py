"""What a study needs of its user and does not find: weights, pictures.

A dry run goes on without them as far as it can. Of a model that is not here it takes the networks'
shapes from the configurations of its family, if the study says which (`model.family`); of pictures
that are not here nothing is known, not even their number.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from lyco_lab.config import Model, Run, Study
from lyco_lab.data.stage import place
from lyco_lab.diffusion.sources import find
from lyco_lab.diffusion.sources.single_file import CONFIGS
from lyco_lab.errors import UserError
from lyco_lab.miniature import placed

SHAPES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}  # family -> its folder of configurations


@dataclass(frozen=True)
class Lacking:
    """`study` is the one asked about, with models that are here; `said` is a line for each lack."""

    study: Study
    models: frozenset[str]  # paths of models that stand in for others
    images: frozenset[str]  # folders and files that are not here
    said: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.said)


def lacking(study: Study) -> Lacking:
    """The study as it can be planned here, and what has to be brought."""
    said: dict[str, None] = {}
    found: dict[Model, Model] = {}
    images: set[str] = set()
    runs = []
    for run in study.runs:
        if run.model not in found:
            found[run.model] = _model(run.model, said)
        if run.data.concept is None and not place(run).exists():
            images.add(str(place(run)))
            said[_pictures(study, run)] = None
        runs.append(replace(run, model=found[run.model]))
    models = {there.path for asked, there in found.items() if asked != there}
    return Lacking(
        replace(study, runs=tuple(runs)), frozenset(models), frozenset(images), tuple(said)
    )


def _model(model: Model, said: dict[str, None]) -> Model:
    try:
        find(placed(model))
    except UserError as error:
        folder = SHAPES.get(model.family or "")
        if Path(model.path).expanduser().exists() or folder is None:
            return model  # planning says what is wrong with it
        said[f"{error}; or give another: model.path=A/FOLDER/OR/FILE"] = None
        return replace(model, path=str(CONFIGS / folder), weights=None, tokenizer=None)
    return model


def _pictures(study: Study, run: Run) -> str:
    key = "folder" if run.data.folder is not None else "toml"
    return (
        f"data.{key} is {str(place(run))!r}, which does not exist: lyco-lab run {study.folder} "
        f"--dry-run data.{key}=YOURS"
    )
