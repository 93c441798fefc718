"""A word of one's own: a new token for a model, and a vector for it in each text encoder.

The vectors alone can train. Those of all other tokens are the model's own tensors, which nothing
writes to. In a text the token counts where it stands as a word, in capitals or not.

Reference: An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion (Gal et al., 2022), https://arxiv.org/abs/2208.01618
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lyco_lab.diffusion.base import Diffusion
from lyco_lab.errors import UserError

LEGACY_END = 2  # what old configurations call the last token, whatever it is


class Word(nn.Module):
    """A text encoder's embedding with one token more, whose number is `token`."""

    def __init__(self, base: nn.Module, token: int, start_1D: Tensor) -> None:
        super().__init__()
        self.base, self.token = base, token
        self.vector_1D = nn.Parameter(start_1D.float())

    def forward(self, ids: Tensor) -> Tensor:
        ours = ids == self.token
        others: Tensor = self.base(ids.masked_fill(ours, 0))
        return torch.where(ours[..., None], self.vector_1D.to(others.dtype), others)


def encoders(diffusion: Diffusion) -> dict[str, tuple[Any, Any]]:
    """The text encoders by name, each with its tokenizer."""
    return {
        name: (part, getattr(diffusion, name.replace("text_encoder", "tokenizer")))
        for name, part in diffusion.parts.items()
        if name.startswith("text_encoder")
    }


@torch.no_grad()
def mean(diffusion: Diffusion, text: str) -> dict[str, Tensor]:
    """For each text encoder, the mean of the vectors of a text's tokens: (1, D)."""
    found = {}
    for name, (encoder, tokenizer) in encoders(diffusion).items():
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        vectors_ND = encoder.get_input_embeddings()(ids.to(encoder.device))
        found[name] = vectors_ND.float().mean(0, keepdim=True)
    return found


def add(diffusion: Diffusion, token: str, vectors: Mapping[str, Tensor]) -> dict[str, Word]:
    """Teach the model this token, with a (1, D) vector for each of its text encoders."""
    from tokenizers import AddedToken

    known = encoders(diffusion)
    if vectors.keys() != known.keys():
        raise UserError(
            f"the token {token!r} has vectors for {', '.join(vectors)}, but the model's text "
            f"encoders are {', '.join(known)}"
        )
    for name, (encoder, tokenizer) in known.items():
        found, needed = vectors[name].shape[-1], encoder.get_input_embeddings().weight.shape[-1]
        if vectors[name].shape != (1, needed):
            raise UserError(
                f"the token {token!r} has a vector of {found} numbers for the {name}, whose "
                f"vectors have {needed}: it is of another model"
            )
        if token in tokenizer.get_vocab():
            raise UserError(f"{token!r} is a token of the {name} already: needs another word")
    words = {}
    for name, (encoder, tokenizer) in known.items():
        tokenizer.add_tokens(AddedToken(token, single_word=True, normalized=True))
        number = tokenizer.convert_tokens_to_ids(token)
        base = encoder.get_input_embeddings()
        words[name] = Word(base, number, vectors[name].to(base.weight.device))
        encoder.set_input_embeddings(words[name])
        for module in encoder.modules():
            # Old models find the end of a text by its having the largest number.
            if getattr(module, "eos_token_id", None) == LEGACY_END:
                module.eos_token_id = tokenizer.eos_token_id
    return words


def occurs(diffusion: Diffusion, token: str, text: str) -> bool:
    """Whether the text has the token, once it was added."""
    (_, tokenizer), *_ = encoders(diffusion).values()
    return tokenizer.convert_tokens_to_ids(token) in tokenizer(text).input_ids
