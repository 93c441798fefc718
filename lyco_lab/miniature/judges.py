"""The networks that measure pictures, loaded from the miniature's folder.

Pictures come in as (N, H, W, 3) uint8 and are brought to 64 x 64 first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from lyco_lab.errors import UserError
from lyco_lab.miniature import path as shipped
from lyco_lab.miniature.networks import VOCABULARY, Embedder, Gram, Oracle
from lyco_lab.readers import Damaged, read_safetensors

Images = NDArray[np.uint8]
Network = TypeVar("Network", bound=nn.Module)


def to_input(images: Images) -> Tensor:
    """uint8 (N, H, W, 3) to floats (N, 3, 64, 64) in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-2:] != (64, 64):
        x = nn.functional.interpolate(x, (64, 64), mode="bicubic", antialias=True).clamp(-1, 1)
    return x


@dataclass(frozen=True)
class Judges:
    """What each measure looks with. `vocabulary` names the oracle's classes, family by family."""

    tokenizer: CLIPTokenizer
    clip: CLIPModel
    embedder: Embedder
    gram: Gram
    oracle: Oracle
    device: torch.device = torch.device("cpu")

    @property
    def vocabulary(self) -> dict[str, tuple[str, ...]]:
        return VOCABULARY

    def input(self, images: Images) -> Tensor:
        return to_input(images).to(self.device)

    @torch.no_grad()
    def clip_image(self, images: Images) -> Tensor:
        """(N, 96) unit rows, comparable with `clip_text`'s."""
        found = self.clip.get_image_features(self.input(images)).pooler_output
        return nn.functional.normalize(found, dim=1)

    @torch.no_grad()
    def clip_text(self, texts: list[str]) -> Tensor:
        """(N, 96) unit rows; texts are cut at the tokenizer's length."""
        ids = self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)
        return nn.functional.normalize(self.clip.get_text_features(ids).pooler_output, dim=1)

    @torch.no_grad()
    def image_features(self, images: Images) -> Tensor:
        """(N, 96), in DINOv2's part: for similarity and diversity."""
        return self.embedder.embedding(self.input(images))

    @torch.no_grad()
    def gram_features(self, images: Images) -> list[Tensor]:
        """Five (N, C, H, W) maps, in VGG19's part: for style."""
        return self.gram.features(self.input(images))

    @torch.no_grad()
    def attributes(self, images: Images) -> dict[str, Tensor]:
        """family -> (N, values) probabilities, in the order of `vocabulary`."""
        return {f: v.softmax(1) for f, v in self.oracle(self.input(images)).items()}


def load(folder: Path | None = None, device: torch.device | str = "cpu") -> Judges:
    """The judges in `folder`/judges, by default those shipped with the package, in float32."""
    device = torch.device(device)
    folder = (folder or shipped()) / "judges"
    if not (folder / "oracle.safetensors").is_file():
        raise UserError(f"{folder} holds no judges: expected oracle.safetensors there")

    def network(kind: type[Network], name: str) -> Network:
        net = kind()
        path = folder / f"{name}.safetensors"
        try:
            net.load_state_dict(read_safetensors(path)[0])
        except RuntimeError as error:
            raise Damaged(path, f"it is not the {name} ({str(error).splitlines()[0]})") from error
        return net.float().eval().requires_grad_(False).to(device)

    clip = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / "tokenizer")
    return Judges(
        tokenizer=tokenizer,
        clip=clip.eval().requires_grad_(False).to(device),
        embedder=network(Embedder, "embedder"),
        gram=network(Gram, "gram"),
        oracle=network(Oracle, "oracle"),
        device=device,
    )
