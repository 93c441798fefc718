"""How an optimizer moves factors: groups, rates, clipping, and an average of where they were.

    lr_n     = lr * share(n)                                    at step n, see schedule.py
    g       <- g * min(1, grad_clip / |w g|)                    |.| over all factors together
    average <- average + (1 - ema_decay) * (factor - average)   after the step

w is 1, unless a group of the run says otherwise (`clip`). Each commutes with scaling the factors by
a power of two, which the bitwise check of the gamma theorem needs. That is why clipping is written
here: torch's adds 1e-6 to the norm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lyco_lab.config import Train
from lyco_lab.config.groups import group_of
from lyco_lab.optimizers.base import Group, Optimizer

WORD_LR = 5e-4  # of a token's vector, where none is given


@dataclass(frozen=True)
class Factor:
    """A factor that trains, and where it stands."""

    part: str  # of the model: unet, text_encoder
    layer: str
    name: str
    parameter: nn.Parameter

    @property
    def place(self) -> tuple[str, str]:
        """The layer and the factor, as patterns of a run's groups see them."""
        return f"{self.part}.{self.layer}", self.name


def groups(settings: Train, rule: Optimizer, factors: Sequence[Factor]) -> list[Group]:
    """A group for each part of the model and each group of the run."""
    together: dict[tuple[str, int], list[Factor]] = {}
    held = {id(group): number for number, group in enumerate(settings.groups, start=1)}
    for factor in factors:
        number = held.get(id(group_of(settings.groups, *factor.place)), 0)
        together.setdefault((factor.part, number), []).append(factor)
    made = []
    for (part, number), members in together.items():
        own = group_of(settings.groups, *members[0].place)
        made.append(
            Group(
                name=f"{part}, group {number}" if number else part,
                parameters=[member.parameter for member in members],
                lr=settings.rate(part) * own.lr,
                rule=rule.moved(own.optimizer),
            )
        )
    return made


def of_word(part: str, vector: nn.Parameter, lr: float | None, rule: Optimizer) -> Group:
    """The group of a token's vector, which is not drawn towards 0."""
    undecayed = rule.moved({"weight_decay": 0.0}) if hasattr(rule, "weight_decay") else rule
    return Group(f"{part}, embedding", [vector], WORD_LR if lr is None else lr, undecayed)


def build(rule: Optimizer, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """The optimizer that moves these groups."""
    optimizer = rule.build(groups)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]  # `lr` follows the schedule
    return optimizer


def weights(settings: Train, factors: Sequence[Factor]) -> list[float]:
    """What weighs the gradients of each factor in the norm that is clipped."""
    return [group_of(settings.groups, *factor.place).clip for factor in factors]


def set_rates(optimizer: torch.optim.Optimizer, shares: Sequence[float]) -> None:
    """Give each group its share of its learning rate."""
    for group, share in zip(optimizer.param_groups, shares, strict=True):
        group["lr"] = group["base_lr"] * share


@torch.no_grad()
def norm(parameters: Sequence[nn.Parameter], weights: Sequence[float]) -> Tensor:
    """The weighed norm of all gradients together; a number that stays on its device.

    The parameters come in the model's order, so that the sum does not depend on the groups.
    """
    pairs = [(p.grad, w) for p, w in zip(parameters, weights, strict=True) if p.grad is not None]
    gradients = [gradient for gradient, _ in pairs]
    norms = list(torch._foreach_norm(gradients))
    if any(weight != 1 for _, weight in pairs):
        norms = [norm * weight for norm, (_, weight) in zip(norms, pairs, strict=True)]
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], largest: float | None, norm: float) -> None:
    """Scale all gradients down together if their norm exceeds `largest`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if largest is not None and norm > largest:
        torch._foreach_mul_(gradients, largest / norm)


class Average:
    """An exponential moving average of the factors, which is exported in their place."""

    def __init__(self, factors: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._factors = dict(factors)
        self.values = {name: factor.detach().clone() for name, factor in factors.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(
            list(self.values.values()), list(self._factors.values()), 1 - self.decay
        )

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange average and factors; again, and both are back bit for bit."""
        for name, factor in self._factors.items():
            kept = factor.detach().clone()
            factor.copy_(self.values[name])
            self.values[name].copy_(kept)
