"""Settings at which every part of a rule matters, and a walk that an optimizer is taken on.

The gradient of the walk is a smooth function of theta / s, times 1 / s: what the loss of an adapter
gives to factors that are s times as large. Its size comes and goes, so that running means, largest
values and signs all have something to follow.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

from lyco_lab.errors import UserError
from lyco_lab.optimizers.base import Group, Optimizer

STEPS = 20

# By a field's name, or its optimizer's and its own, values at which it matters here, the first of
# them together with the first of all others. A field that is not named keeps its default.
SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "betas": ((0.9, 0.9), (0.8, 0.95), (0.9, 0.99)),
    "eps": (0.1, 0.02, 1e-8),
    "weight_decay": (0.3, 0.05, 0.0),
    "amsgrad": (False, True),
    "momentum": (0.9, 0.5),
    "dampening": (0.0, 0.3),
    "nesterov": (False, True),
    "alpha": (0.75, 0.9),
    "centered": (False, True),
    "momentum_decay": (0.004, 0.1),
    "unrectified_lr": (0.5, 2.0, 0.0),
    "etas": ((0.5, 1.2), (0.3, 1.5)),
    "step_sizes": ((0.001, 0.02), (0.0003, 0.1)),
    "lr_decay": (0.1, 0.0),
    "initial_accumulator_value": (0.5, 0.05, 0.0),
    "rho": (0.9, 0.8),
    "lambd": (0.5, 0.1),
    "t0": (0.0, 4.0),
    "eps2": (3.0, 0.5),
    "beta2_decay": (-0.8, -0.5),
    "d": (0.5, 1.0),
    "beta3": (None, 0.8),
    "use_bias_correction": (True, False),
    "safeguard_warmup": (True, False),
    "d0": (1e-2, 3e-3),
    "d_coef": (1.0, 2.0),
    "growth_rate": (1.05, None),
    "r": (0.0, 1.0),
    "weight_lr_power": (2.0, 1.0),
    "muon.eps": (9.0, 2.0, 1e-7),  # above the norm of the gradients
    "ns_steps": (5, 3),
    "adjust_lr_fn": ("original", "match_rms_adamw"),
}
RATES = {"prodigy": 0.5, "adadelta": 0.1}


def values(cls: type[Optimizer]) -> dict[str, tuple[Any, ...]]:
    kind = cls.__name__.lower()
    named = {f.name: f"{kind}.{f.name}" for f in fields(cls)}
    keys = {name: own if own in SETTINGS else name for name, own in named.items()}
    return {name: SETTINGS[key] for name, key in keys.items() if key in SETTINGS}


def standard(cls: type[Optimizer], **changes: Any) -> Optimizer:
    return cls(**{name: given[0] for name, given in values(cls).items()} | changes)


@st.composite
def rules(draw: st.DrawFn, cls: type[Optimizer]) -> Optimizer:
    drawn = {name: draw(st.sampled_from(given)) for name, given in values(cls).items()}
    try:
        return cls(**drawn)
    except UserError:
        reject()


def base_lr(cls: type[Optimizer]) -> float:
    return RATES.get(cls.__name__.lower(), 0.01)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch keeps some numbers of an optimizer in the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Walk:
    """Groups of factors under rules of one class, each group at its scale s."""

    # The last is large enough for a state of 8 bits.
    SHAPES = ((3, 5), (7,), (), (2, 3, 2), (65, 64))

    def __init__(
        self,
        rules: Sequence[Optimizer],
        lrs: Sequence[float],
        scales: Sequence[float],
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        names: Sequence[str] = "abc",
    ) -> None:
        self.rules, self.lrs, self.scales, self.dtype = rules, lrs, scales, dtype
        self.groups: list[list[nn.Parameter]] = []
        self.targets: list[Tensor] = []
        for name, rule, s in zip(names, rules, scales, strict=False):
            rng = torch.Generator().manual_seed(seed + ord(name))
            free = [nn.Parameter(torch.zeros(shape)) for shape in self.SHAPES]
            taken = [p.shape for p in free if not rule.accepts(p)]

            def normal(*shape: int, rng: torch.Generator = rng) -> Tensor:
                return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

            group = [nn.Parameter(s * normal(*shape)) for shape in taken]
            self.groups.append(group)
            self.targets.append(normal(sum(p.numel() for p in group)))
        listed = [
            Group(name, parameters, lr, rule)
            for name, parameters, lr, rule in zip(names, self.groups, lrs, rules, strict=False)
        ]
        with default_dtype(dtype):
            self.optimizer = rules[0].build(listed)
        self.start = self.values()

    def go(self, start: int, stop: int) -> "Walk":
        with default_dtype(self.dtype):
            for step in range(start, stop):
                self.step(step)
        return self

    def step(self, step: int) -> None:
        loudness, warm_up = 0.3 * (1 + 0.8 * math.sin(1.3 * step)), min(1.0, (step + 1) / 8)
        for number, x in enumerate(self.values()):
            group, rule = self.groups[number], self.rules[number]
            lr = self.lrs[number] * warm_up * rule.rate(step)
            self.optimizer.param_groups[number]["lr"] = lr
            pull = torch.tanh(x - self.targets[number]) + 0.3 * torch.sin(3 * x + step)
            parts = (pull * (loudness / self.scales[number])).split([p.numel() for p in group])
            for factor, part in zip(group, parts, strict=True):
                factor.grad = part.view(factor.shape)
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        """What each group's factors are in units of its scale, one long vector a group."""
        return [
            torch.cat([p.detach().flatten() for p in group]) / s
            for group, s in zip(self.groups, self.scales, strict=True)
        ]


def walk(
    rule: Optimizer,
    s: float = 1.0,
    lr: float | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Walk:
    """One group; its learning rate is that of its kind, unless it is given."""
    return Walk([rule], [base_lr(type(rule)) if lr is None else lr], [s], dtype, seed)


def moved(rule: Optimizer, s: float, dtype: torch.dtype = torch.float64, seed: int = 0) -> Walk:
    """The walk at scale s, with the settings where the claim has them."""
    lr = base_lr(type(rule)) * s ** rule.powers.get("lr", 0)
    return walk(rule.scaled(s), s, lr, dtype, seed)


def gap(one: Walk, other: Walk) -> float:
    """The distance of their factors, in units of the factors: how well rounding lets them agree."""
    (here,), (there,) = one.values(), other.values()
    return float((here - there).norm() / here.norm())


def off(one: Walk, other: Walk) -> float:
    """The distance of their factors, in units of how far the first has gone."""
    (here,), (start,) = one.values(), one.start
    return gap(one, other) * float(here.norm() / (here - start).norm())
