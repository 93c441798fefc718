"""AdamW8bit: AdamW that keeps m and v in 8 bits.

    AdamW's rule (adamw.py), where m and v of 4096 entries or more are kept as

    code(m / largest |m| of its block of 256), and that largest

which saves 6 of the 8 bytes that AdamW keeps beside each entry. Smaller factors, on which little
could be saved, keep 32 bits.

The codes measure m and v in units of their block's largest entry, which moves as they do, so the
settings move as AdamW's do: the learning rate by s, eps and weight_decay by 1 / s, as
theory/optimizers derives. For s a power of two every bit stays; for any other, an entry near the
edge between two codes may be rounded to the other, by up to some per cent of it.

Reference: 8-bit Optimizers via Block-wise Quantization (Dettmers et al., 2022),
https://arxiv.org/abs/2110.02861
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE


@dataclass(frozen=True)
class AdamW8bit(Optimizer):
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.99)
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01  # decoupled

    powers: ClassVar = {"lr": 1, "eps": -1, "weight_decay": -1}
    coarse: ClassVar = "it keeps its state in 8 bits, that of small factors in float32"

    def __post_init__(self) -> None:
        self.check(betas=(0, 1), eps=(0, float("inf")), weight_decay=(0, float("inf")))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return self.package("bitsandbytes", "bitsandbytes").optim.AdamW8bit(groups)
