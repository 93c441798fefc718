"""Repositories of the Hugging Face hub that were fetched before, in its local cache."""

import re
from pathlib import Path

from lyco_lab.errors import UserError

NAME = re.compile(r"[\w.-]+/[\w.-]+")
FETCHED = (  # of a repository, what is used
    *("*.json", "*.txt", "tokenizer*/*"),
    *(f"{part}/*.safetensors" for part in ("unet", "transformer", "vae", "text_encoder*")),
)


def cached(name: str, fetched: tuple[str, ...] = FETCHED, setting: str = "model.path") -> Path:
    """The folder of a repository of the hub, if it was fetched before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        patterns = " ".join(f"--include {pattern!r}" for pattern in fetched)
        raise UserError(
            f"{setting} is {name!r}, which is neither here nor in the hub's local cache; "
            f"fetch it with: hf download {name} {patterns}"
        ) from None
