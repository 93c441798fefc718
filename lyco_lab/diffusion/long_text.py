"""Texts longer than the window of a text encoder: read in chunks, and joined.

A text encoder with a window of L reads begin, at most L - 2 tokens of a text, and end. The tokens
x_1, x_2, … of a longer text are cut into K chunks, wherever in a word that may be; what is behind
K (L - 2) tokens is cut off. Chunk k = 0, …, K - 1 is read as a text of its own, at the places from
0 to L - 1, and seen by no other:

    begin, x_{k(L-2)+1}, …, x_{(k+1)(L-2)}, end         filled up as any text is

so that chunks behind a text's end are the empty text. Of its states h_{k,0}, …, h_{k,L-1} only the
outermost begin and end are kept:

    hidden = h_{0,0};  h_{k,1}, …, h_{k,L-2} for k = 0, …, K - 1;  h_{K-1,L-1}     K (L - 2) + 2
    pooled = what the text encoder says of chunk 0 as a whole

These are the states that the family uses: layers skipped, the last norm taken where it takes it,
both of which act on each row alone. K = 1 is the text encoder as it is. The rule is that of
sd-scripts' `max_token_length`, which is K (L - 2), for Stable Diffusion 1, 2 and XL alike:
https://github.com/kohya-ss/sd-scripts, library/strategy_base.py, strategy_sd.py, strategy_sdxl.py.
Only where texts are filled up with a token that they may have themselves, "!" in SD 2 and in SDXL's
second text encoder, does sd-scripts put another mark around a chunk that begins or ends with it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tokens(tokenizer: Any, texts: Sequence[str], chunks: int) -> Tensor:
    """(N, K L) token numbers: a row has its text's K chunks end to end."""
    how = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    if chunks == 1:
        ids_NL: Tensor = tokenizer(list(texts), **how, return_tensors="pt").input_ids
        return ids_NL
    found = tokenizer([*texts, ""], **how, return_overflowing_tokens=True)
    rows: list[list[int]] = [[] for _ in (*texts, "")]
    for text, ids in zip(found.overflow_to_sample_mapping, found.input_ids, strict=True):
        rows[text] += ids
    empty, length = chunks * rows.pop(), chunks * tokenizer.model_max_length
    return torch.tensor([(row + empty)[:length] for row in rows])


def apart(ids: Tensor, chunks: int) -> Tensor:
    """(N, K L) -> (N K, L): each chunk a text of its own."""
    return ids.reshape(len(ids) * chunks, -1)


def joined(states: Tensor, chunks: int) -> Tensor:
    """(N K, L, D) -> (N, K (L - 2) + 2, D)."""
    if chunks == 1:
        return states
    h_NKLD = states.unflatten(0, (-1, chunks))
    first, last = h_NKLD[:, 0, :1], h_NKLD[:, -1, -1:]
    return torch.cat([first, h_NKLD[:, :, 1:-1].flatten(1, 2), last], 1)


def longest(tokenizer: Any, chunks: int) -> int:
    """How many tokens are read, those of the text's begin and end among them: K (L - 2) + 2."""
    window: int = tokenizer.model_max_length
    return window + (chunks - 1) * (window - 2)
