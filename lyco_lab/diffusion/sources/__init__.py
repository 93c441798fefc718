"""Where a model's parts come from.

    folder                      model_index.json, unet/, vae/, text_encoder/, … as of diffusers
    file.safetensors, .ckpt     all networks in one file
    owner/name                  a folder in the local cache of the Hugging Face hub

Nothing is ever fetched: what is missing is an error that gives the command.
"""

from pathlib import Path

from lyco_lab.config import Model
from lyco_lab.diffusion.sources import hub
from lyco_lab.diffusion.sources.base import Source
from lyco_lab.diffusion.sources.folder import Folder
from lyco_lab.diffusion.sources.single_file import SingleFile
from lyco_lab.errors import UserError


def find(model: Model) -> Source:
    """What `model.path` means."""
    path = Path(model.path).expanduser()
    if path.is_dir():
        return Folder(model, path)
    if path.suffix in (".safetensors", ".ckpt"):
        return SingleFile(model, path)
    if path.is_file():
        raise UserError(f"model.path is {model.path!r}: a file has to be a .safetensors or a .ckpt")
    if hub.NAME.fullmatch(model.path):
        return Folder(model, hub.cached(model.path))
    raise UserError(f"model.path is {model.path!r}, which does not exist")
