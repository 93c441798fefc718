"""Muon: the mean gradient of a matrix, with its singular values made nearly 1.

    b <- momentum * b + (1 - momentum) * g          n = momentum * b + (1 - momentum) * g
    O = NS(n / max(|n|, eps))                       n = b without nesterov
    theta <- (1 - lr * weight_decay) * theta - lr * a * O

NS takes `ns_steps` steps of a quintic Newton-Schulz iteration, which drives each singular value to
about 1. a = sqrt(max(1, rows / columns)) if `adjust_lr_fn` is "original", and
0.2 * sqrt(max(rows, columns)) if it is "match_rms_adamw", whose steps have the size of AdamW's.

O does not depend on the size of the gradient, so the learning rate moves by s, and eps and
weight_decay by 1 / s, as theory/optimizers derives. NS runs in bfloat16, whatever the factors are
in: for s a power of two every bit stays, for any other s n is rounded to 8 bits differently and two
runs agree to about 1%.

References:
    Muon: An optimizer for hidden layers in neural networks (Jordan et al., 2024),
    https://kellerjordan.github.io/posts/muon/
    Muon is Scalable for LLM Training (Liu et al., 2025), for "match_rms_adamw",
    https://arxiv.org/abs/2502.16982
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from lyco_lab.errors import nearest
from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import NOT_NEGATIVE, SHARE, Within

ADJUSTMENTS = ("original", "match_rms_adamw")


@dataclass(frozen=True)
class Muon(Optimizer):
    momentum: Annotated[float, SHARE] = 0.95
    nesterov: bool = True
    eps: Annotated[float, NOT_NEGATIVE] = 1e-7
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01  # decoupled
    ns_steps: Annotated[int, Within(1, 99)] = 5
    adjust_lr_fn: str = "original"

    powers: ClassVar = {"lr": 1, "eps": -1, "weight_decay": -1}
    coarse: ClassVar = "it orthogonalises in bfloat16"

    def __post_init__(self) -> None:
        most = float("inf")
        self.check(momentum=(0, 1), eps=(0, most), weight_decay=(0, most), ns_steps=(1, 100))
        if self.adjust_lr_fn not in ADJUSTMENTS:
            hint = nearest(str(self.adjust_lr_fn), list(ADJUSTMENTS))
            self.refuse(
                f"needs adjust_lr_fn to be one of {', '.join(ADJUSTMENTS)}, "
                f"got {self.adjust_lr_fn!r}{hint}"
            )

    def accepts(self, parameter: nn.Parameter) -> str:
        if parameter.dim() == 2:
            return ""
        return "it makes singular values alike, which only a matrix has; choose another for these"

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not hasattr(torch.optim, "Muon"):
            self.refuse(f"needs torch >= 2.9, this is {torch.__version__}")
        return torch.optim.Muon(groups)
