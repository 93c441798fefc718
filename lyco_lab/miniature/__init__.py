"""An embedded world, and a small Stable Diffusion trained on it.

vocabulary -> frame -> backgrounds, figures, styles -> world -> concepts -> prompts
networks -> judges
pretrain/      the recipe that makes the shipped weights from nothing
weights/       those weights: a StableDiffusionPipeline's folder, and its judges
"""

from dataclasses import replace
from pathlib import Path

from lyco_lab.config import Model
from lyco_lab.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"


def model_folder(model: str) -> Path:
    """The diffusers folder that a study's `model.path` means: "miniature" is this one."""
    return path() if model == "miniature" else Path(model)


def placed(model: Model) -> Model:
    """A run's model, with the place of the embedded one for its name."""
    return replace(model, path=str(path())) if model.path == "miniature" else model


def path() -> Path:
    """The folder for `StableDiffusionPipeline.from_pretrained`."""
    if not (WEIGHTS / "model_index.json").is_file():
        raise UserError(
            f"{WEIGHTS} holds no weights: install the package whole, or make them with "
            f"`lyco-lab pretrain {WEIGHTS}`"
        )
    return WEIGHTS
