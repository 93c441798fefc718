"""What an optimizer is: settings, how to make it, and how the settings move with the factors.

An optimizer is a value. Its fields are its hyperparameters but for the learning rate, which belongs
to the training; a class says how they become an optimizer of torch or of another package.

It also makes a claim. Let the factors be scaled, theta -> s theta, and hence their gradients,
g -> g / s. The step commutes with that scaling once each setting x moves to x * s**powers[x], and
what is not listed stays:

    step(s theta, g / s; moved settings)  =  s step(theta, g; settings)

This is what the theorem on gamma asks of an optimizer (lyco_lab/gamma.py). If the direction is
homogeneous of degree k in the gradients and p in the factors, the power of lr is 1 + k - p.
"""

import abc
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import ModuleType
from typing import Any, ClassVar, NoReturn, final

import torch
from torch import nn

from lyco_lab.errors import UserError


@dataclass(frozen=True)
class Group:
    """Factors that share their settings."""

    name: str
    parameters: Sequence[nn.Parameter]
    lr: float
    rule: "Optimizer"


@dataclass(frozen=True)
class Optimizer(abc.ABC):
    """The settings of an optimizer, and what is claimed of them."""

    # Claim: setting -> the power of s by which it moves. Settings are fields, and "lr".
    powers: ClassVar[Mapping[str, int]] = {}

    # Why no such powers exist; "" where they do.
    no_gamma: ClassVar[str] = ""

    # Why all factors must be scaled by one s; "" where each may have its own.
    one_scale: ClassVar[str] = ""

    # Claim: the step commutes with a scaling by a power of two in every bit, on this processor.
    # False only where the rule itself is not homogeneous bit by bit; the class says why.
    exact: ClassVar[bool] = True

    # Why two runs agree only roughly where s is no power of two: somewhere in the step numbers are
    # rounded to far fewer bits than the factors have. "" where rounding is the factors' own.
    coarse: ClassVar[str] = ""

    # Whether what is to be used after training is not what trains: the optimizer then has
    # `eval()` and `train()`, which exchange the two in the parameters.
    averages: ClassVar[bool] = False

    # Claim: why a step waits for numbers of the device, beside the one wait of every step
    # (lyco_lab/waits.py). "" where it does not.
    waits: ClassVar[str] = ""

    @abc.abstractmethod
    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of these groups, each of which has its `options` and its lr."""

    def options(self) -> dict[str, Any]:
        """The fields as the optimizer's groups call them."""
        return asdict(self)

    def rate(self, step: int) -> float:
        """What multiplies the scheduled learning rate at step 0, 1, ..."""
        return 1.0

    def accepts(self, parameter: nn.Parameter) -> str:
        """Why this factor cannot be moved by this optimizer; "" if it can."""
        return ""

    @final
    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer that moves these groups, whose rules are of this class."""
        listed = []
        for group in groups:
            for parameter in group.parameters:
                reason = self.accepts(parameter)
                if reason:
                    shape = tuple(parameter.shape)
                    self.refuse(f"cannot train a factor of shape {shape} ({group.name}): {reason}")
            own = {"params": list(group.parameters), "lr": group.lr, "name": group.name}
            listed.append(group.rule.options() | own)
        return self.make(listed)

    @final
    def moved(self, factors: Mapping[str, float]) -> "Optimizer":
        """With each of these fields multiplied by its number; for a pair, both."""
        return replace(self, **{k: multiplied(getattr(self, k), v) for k, v in factors.items()})

    @final
    def scaled(self, s: float) -> "Optimizer":
        """The settings for factors that are `s` times as large, but for lr."""
        own = {field.name for field in fields(self)}
        return self.moved({k: s**p for k, p in self.powers.items() if k in own})

    @final
    def refuse(self, why: str) -> NoReturn:
        raise UserError(f"the optimizer {type(self).__name__.lower()} {why}")

    @final
    def check(self, **bounds: tuple[float, float]) -> None:
        """Raise an error unless each named field (or both of a pair) is in [low, high)."""
        for name, (low, high) in bounds.items():
            value, default = getattr(self, name), getattr(type(self), name)
            if value is None and default is None:
                continue
            size = len(default) if isinstance(default, tuple) else 1
            numbers = value if isinstance(value, tuple) else (value,)
            real = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
            if len(numbers) != size or not real:
                what = f"{size} numbers" if size > 1 else "a number"
                self.refuse(f"needs {name} to be {what}, got {value!r}")
            if not all(math.isfinite(n) and low <= n < high for n in numbers):
                lower = [] if math.isinf(low) else [f">= {low:g}"]
                upper = [] if math.isinf(high) else [f"< {high:g}"]
                need = " and ".join(lower + upper) or "finite"
                self.refuse(f"needs {name} {need}, got {value}")

    @final
    def package(self, module: str, distribution: str) -> ModuleType:
        """A module of a package that is not always installed."""
        try:
            return importlib.import_module(module)
        except ImportError as error:
            self.refuse(
                f"needs the package {distribution}: pip install 'lyco-lab[optimizers]' ({error})"
            )


def multiplied(value: Any, by: float) -> Any:
    """A setting times a number. None, for no setting, stays."""
    if value is None:
        return None
    return tuple(by * v for v in value) if isinstance(value, tuple) else by * value
