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


def placed(model: Model) -> Model:
    """A run's model, with the place of the embedded one for its name."""
    return replace(model, path=str(path())) if model.embedded else model


def path() -> Path:
    """The folder for `StableDiffusionPipeline.from_pretrained`."""
    if not (WEIGHTS / "model_index.json").is_file():
        raise UserError(
            f"{WEIGHTS} holds no weights: install the package whole, or make them with "
            f"`lyco-lab pretrain {WEIGHTS}`"
        )
    return WEIGHTS
