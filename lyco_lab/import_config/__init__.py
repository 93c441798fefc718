"""A training TOML of sd-scripts -> a study's folder.

    lyco-lab import-config FILE.toml --out experiments/mine

keys.py        each key of the file, and what becomes of it
adapter.py     network_* -> adapter, options, model.preset
training.py    optimizer, learning rates, schedule, noise, loss
pictures.py    the model and the images
known.py       keys that no setting stands for

What the file leaves out has their default there and is written down, as ours may be another. The
question and the expectation of the study are left for its author.
"""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lyco_lab.config import Study, load_study
from lyco_lab.config.values import literal
from lyco_lab.data.sdscripts import read_toml
from lyco_lab.errors import UserError, nearest
from lyco_lab.files import writing
from lyco_lab.import_config import pictures, training
from lyco_lab.import_config.adapter import adapter
from lyco_lab.import_config.keys import Keys
from lyco_lab.import_config.known import HARMLESS, READ, UNSUPPORTED

SECTIONS = ("model", "data", "adapter", "options", "optimizer", "train")
TO_FILL_IN = (
    "question: (to fill in) what is to be found out with the training of {name}?\n"
    "expectation: (to fill in) what should come out, said before it is run\n"
)


@dataclass(frozen=True)
class Imported:
    study: Study
    carried: int  # how many settings were written
    left: dict[str, str]  # key -> why it could not be carried over, or not whole
    idle: dict[str, str]  # key -> why nothing has to be said of it


def import_config(
    path: Path, out: Path | None = None, epoch_steps: float | None = None
) -> Imported:
    """Write the study that `path` describes; `epoch_steps` where the images are not here."""
    keys = read(path)
    translate(keys, epoch_steps)
    name = (
        re.sub(r"[^A-Za-z0-9._-]+", "-", keys.text("output_name") or path.stem).strip("-.")
        or "study"
    )
    folder = Path(name) if out is None else out
    if (folder / "study.yaml").exists():
        raise UserError(f"{folder} has a study.yaml already: choose another folder with --out")
    text = TO_FILL_IN.format(name=name) + write(keys, name)
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
            # Of the same name as the folder to be, which is the study's.
            made = Path(temporary) / folder.resolve().name
            made.mkdir()
            (made / "study.yaml").write_text(text, encoding="utf-8")
            try:
                load_study(made)
            except UserError as error:
                said = str(error).replace(str(made / "study.yaml"), f"the study of {path}")
                raise UserError(f"{path} asks for what does not go together here: {said}") from None
            folder.mkdir(exist_ok=True)
            shutil.move(made / "study.yaml", folder / "study.yaml")
    return Imported(load_study(folder), len(keys.settings), keys.left, keys.idle)


def read(path: Path) -> Keys:
    """The file's keys. Names of tables are for people only: what is in them counts."""
    content = read_toml(path)
    if "datasets" in content:
        raise UserError(
            f"{path} describes a dataset, not a training: a study names it as data.toml={path}"
        )
    values: dict[str, Any] = {}
    for name, value in content.items():
        inner = value if isinstance(value, dict) else {name: value}
        for key, found in inner.items():
            if key in values:
                raise UserError(f"{path} gives {key} twice: {values[key]!r} and {found!r}")
            values[key] = found
    if not values:
        raise UserError(f"{path} is empty")
    return Keys(path, values)


def translate(keys: Keys, epoch_steps: float | None = None) -> None:
    """Fill in the settings of `keys`, and what becomes of those that have none."""
    pictures.model(keys)
    adapter(keys)
    training.optimizer(keys)
    training.rates(keys)
    pictures.data(keys)
    if epoch_steps is None and (keys.has("max_train_epochs") or keys.has("save_every_n_epochs")):
        epoch_steps = pictures.steps_per_epoch(keys)
    training.length(keys, epoch_steps)
    training.noise(keys)
    keys.used.add("output_name")
    for key, value in keys.values.items():
        if key in keys.used:
            continue
        if key in HARMLESS:
            keys.needless(key, HARMLESS[key])
        elif key in UNSUPPORTED:
            inert, why = UNSUPPORTED[key]
            asks = value not in (None, "") and not any(
                value == one and isinstance(value, bool) == isinstance(one, bool) for one in inert
            )
            (keys.leave if asks else keys.needless)(key, why if asks else "asks for nothing")
        elif value in (None, ""):
            keys.needless(key, "asks for nothing")
        else:
            keys.leave(key, f"not known{nearest(key, (*READ, *HARMLESS, *UNSUPPORTED))}")


def write(keys: Keys, name: str) -> str:
    """The settings as YAML, each with the key it comes from; below them the others, and why."""
    lines = ["", f"# From {keys.path.name}; behind # is its own key.", "set:"]
    if "seed" in keys.settings:
        lines.append(_line("  ", "seed", *keys.settings["seed"]))
    for section in SECTIONS:
        inside = {
            ours.removeprefix(f"{section}."): found
            for ours, found in keys.settings.items()
            if ours.startswith(f"{section}.")
        }
        lines += [f"  {section}:"] * bool(inside)
        lines += [_line("    ", ours, *found) for ours, found in inside.items()]
    for title, found in (
        ("Not carried over, or not whole", keys.left),
        ("Without effect here", keys.idle),
    ):
        lines += ["", f"# {title}:"] * bool(found)
        lines += [f"#   {_shown(keys, key)}: {why}" for key, why in found.items()]
    return "\n".join(lines) + "\n"


def _line(indent: str, ours: str, value: Any, theirs: str) -> str:
    if isinstance(value, str):
        value = literal(value)  # no reference to another setting
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return f"{indent}{ours}: {text} # {theirs}"


def _shown(keys: Keys, key: str) -> str:
    """A key with its value, unless that is a secret or is shown already."""
    value = keys.values.get(key)
    secret = key.endswith(("token", "api_key"))
    return key if value is None or secret else " ".join(f"{key} = {value!r}".split())
