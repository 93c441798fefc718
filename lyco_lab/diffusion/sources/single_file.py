"""A model in one file, in the key layout of the original code, as Stable Diffusions are passed on.

    model.diffusion_model.*                  the denoiser
    model_ema.*                              its average over training, where the file has both;
                                             names without their dots
    first_stage_model.*                      the VAE
    cond_stage_model.transformer.*           SD 1.x: CLIP
    cond_stage_model.model.*                 SD 2.x: OpenCLIP
    conditioner.embedders.0.transformer.*    SDXL: CLIP
    conditioner.embedders.1.model.*          SDXL: OpenCLIP

Such a file has weights and nothing else: configs/ has the networks' configurations, and the
tokenizer's vocabulary comes from `model.tokenizer` or the hub's local cache.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lyco_lab.config import Model
from lyco_lab.diffusion import original_names
from lyco_lab.diffusion.sources.base import Source, check_choice
from lyco_lab.diffusion.sources.hub import cached
from lyco_lab.diffusion.tensors import Tensors, first_line, read
from lyco_lab.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
VOCABULARY = "openai/clip-vit-large-patch14"  # the same in every Stable Diffusion
VOCABULARY_FILES = ("vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json")

AVERAGE = "model_ema."
NETWORKS = {
    "unet": ("model.diffusion_model.", original_names.unet),
    "vae": ("first_stage_model.", original_names.vae),
}
TEXT_ENCODERS = {  # by folder of configurations
    "sd15": {"text_encoder": ("cond_stage_model.transformer.", original_names.clip)},
    "sd21": {"text_encoder": ("cond_stage_model.model.", original_names.open_clip)},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", original_names.clip),
        "text_encoder_2": ("conditioner.embedders.1.model.", original_names.open_clip),
    },
}


class SingleFile(Source):
    def __init__(self, model: Model, path: Path) -> None:
        super().__init__(model)
        self.path = path
        if not path.is_file():
            raise UserError(f"{self.name} does not exist")
        check_choice(self, any(key.startswith(AVERAGE) for key in self.tensors), model.weights)

    @cached_property
    def tensors(self) -> Tensors:
        """All of the file's, by the names in it; read from disk when they are used."""
        return read(self.path, self.name)

    @cached_property
    def layout(self) -> str:
        """The name of the configurations for this file."""
        for name, parts in TEXT_ENCODERS.items():
            if all(any(k.startswith(prefix) for k in self.tensors) for prefix, _ in parts.values()):
                return name
        raise UserError(
            f"{self.name} is not a whole Stable Diffusion 1.x, 2.x or XL: their text encoders are "
            f"not among its {len(self.tensors)} tensors; give other models as a diffusers folder"
        )

    @property
    def configs(self) -> Path:
        return CONFIGS / self.layout

    def files(self, parts: Iterable[str]) -> dict[str, Path]:
        return {"single file": self.path}

    def missing(self, parts: Iterable[str]) -> list[str]:
        return []  # tensors are looked for one by one

    @property
    def prediction(self) -> str | None:
        if "v_pred" in self.tensors:  # an empty tensor, as a mark
            return "v_prediction"
        noted = self.tensors.metadata.get("modelspec.prediction_type", "")
        return {"epsilon": "epsilon", "v": "v_prediction"}.get(noted)

    def schedule(self) -> dict[str, Any]:
        schedule = super().schedule()
        if "ztsnr" in self.tensors:  # a mark, too: trained up to where there is noise alone
            schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return schedule

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        found = super().config(part, file)
        if (self.layout, part) == ("sd21", "unet") and (
            self.model.prediction or self.prediction
        ) == "epsilon":
            found["sample_size"] = 64  # of 512 pixels; those that predict the velocity have 768
        return found

    def network(self, cls: Any, part: str, dtype: torch.dtype) -> nn.Module:
        made, config = self.skeleton(cls, part), self.config(part)
        prefix, locate = (NETWORKS | TEXT_ENCODERS[self.layout])[part]
        state = {}
        for name, shape in ((name, tensor.shape) for name, tensor in made.state_dict().items()):
            place, change = locate(name, config)
            key = self.key(prefix, place)
            if key not in self.tensors:
                raise UserError(f"{self.name} lacks {key}, which is {name} of its {part}")
            tensor = change(self.tensors[key])
            if tensor.shape != shape:
                raise UserError(
                    f"{self.name}: {key} has shape {tuple(tensor.shape)}, "
                    f"{name} of the {part} needs {tuple(shape)}"
                )
            state[name] = tensor.to(dtype, copy=True)
        made.load_state_dict(state, assign=True)
        for module in made.modules():
            ids = getattr(module, "position_ids", None)  # in no file
            if isinstance(ids, Tensor):
                module.position_ids = torch.arange(ids.shape[-1])[None]
        return made

    def key(self, prefix: str, place: str) -> str:
        if self.model.weights == "ema" and prefix == NETWORKS["unet"][0]:
            return AVERAGE + (prefix.removeprefix("model.") + place).replace(".", "")
        bare = prefix + place.removeprefix("text_model.")  # in files older than that wrapper
        return bare if bare in self.tensors else prefix + place

    def tokenizer(self, cls: Any, part: str, pad: str | None) -> Any:
        chosen = self.model.tokenizer
        try:
            folder = Path(chosen) if chosen else cached(VOCABULARY, VOCABULARY_FILES)
        except UserError as error:
            raise UserError(
                f"{self.name} is a single file, which has no tokenizer: set model.tokenizer to a "
                f"folder with CLIP's vocab.json and merges.txt, or {str(error).split('; ')[-1]}"
            ) from None
        if not folder.is_dir():
            raise UserError(f"model.tokenizer is {chosen!r}, which is no folder")
        try:
            return cls.from_pretrained(
                folder, local_files_only=True, **({"pad_token": pad} if pad else {})
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = first_line(error)
            raise UserError(f"cannot load the tokenizer in {str(folder)!r}: {why}") from error
