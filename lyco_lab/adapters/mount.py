"""Put an adapter on the layers of a model, and take it off again. The only stateful adapter code.

    mounted = attach(unet, LoRA(rank=8), names, seed=0)   # the model is frozen, the factors train
    mounted.strength = 0.5                                # W + 0.5 * (W' - W); 0 is W exactly
    mounted.merge()                                       # ordinary layers that hold W'
    mounted.unmerge()                                     # W bit for bit, and the factors on it
    mounted.detach()                                      # the model as it was, still frozen

A layer keeps its name, and its type in the sense of `isinstance`; only its weight is adapted,
never its bias.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lyco_lab.adapters import plan
from lyco_lab.adapters.base import Adapter, Factors
from lyco_lab.errors import UserError, nearest
from lyco_lab.seeds import generator

SUPPORTED = (nn.Linear, *plan.CONVOLUTIONS)


class FactorDict(nn.ParameterDict):
    """The trainable factors of one layer; a type of its own, so that freezing can pass them by."""


class Adapted(nn.Module):
    """What a mounted layer is besides the linear layer or convolution that it was."""

    adapter: Adapter
    strength: float
    factors: FactorDict
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        return plan.apply(self, x)


_TYPES: dict[type[nn.Module], type[Adapted]] = {}  # Linear -> AdaptedLinear, made once


def _adapted_type(kind: type[nn.Module]) -> type[Adapted]:
    if kind not in _TYPES:
        _TYPES[kind] = type(f"Adapted{kind.__name__}", (Adapted, kind), {})
    return _TYPES[kind]


def survey(model: nn.Module, adapter: Adapter, names: Iterable[str]) -> dict[str, int]:
    """How many parameters `adapter` trains on each named layer. Checks all, changes nothing."""
    modules = dict(model.named_modules(remove_duplicate=False))
    counts: dict[str, int] = {}
    seen: dict[int, str] = {}
    for name in names:
        if name not in modules:
            raise UserError(f"{type(model).__name__} has no layer {name!r}{nearest(name, modules)}")
        layer = modules[name]
        if id(layer) in seen:
            alias = seen[id(layer)]
            also = "is named twice" if alias == name else f"is the same layer as {alias!r}"
            raise UserError(f"the layer {name!r} {also}: name each layer to adapt once")
        seen[id(layer)] = name
        if isinstance(layer, Adapted):
            raise UserError(f"the layer {name!r} already carries {layer.adapter}: detach it first")
        if not isinstance(layer, SUPPORTED):
            needed = ", ".join(kind.__name__ for kind in SUPPORTED)
            raise UserError(
                f"cannot adapt the layer {name!r}: it is a {type(layer).__name__}, and an adapter "
                f"needs one of {needed}; leave it out"
            )
        shape = tuple(layer.weight.shape)
        try:
            adapter.check(shape)
        except ValueError as error:
            raise UserError(f"layer {name!r} of shape {shape}: {error}") from error
        counts[name] = adapter.num_params(shape)
    if not counts:
        raise UserError(
            f"no layer of {type(model).__name__} was named for {adapter}: name at least one"
        )
    return counts


def attach(
    model: nn.Module,
    adapter: Adapter,
    names: Iterable[str],
    *,
    seed: int,
    init_scale: float | Callable[[str], float] = 1.0,
) -> "Mounted":
    """Freeze `model` and train `adapter` on the named layers.

    A layer's factors depend on the seed and its name alone, so they are the same on any device
    and whatever other layers are adapted. `init_scale`, a number or a function of the layer's
    name, multiplies all of its factors.
    """
    names = list(names)
    survey(model, adapter, names)
    scales = {name: init_scale(name) if callable(init_scale) else init_scale for name in names}
    for name, scale in scales.items():
        if not math.isfinite(scale) or scale == 0:
            raise UserError(f"init_scale of layer {name!r} must be finite and not 0, got {scale}")
    for module in model.modules():
        if not isinstance(module, FactorDict):  # another adapter on this model keeps training
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    factors = {}
    for name in names:
        layer = model.get_submodule(name)
        factors[name] = _draw(adapter, layer, generator(seed, "adapter", name), scales[name])
    return Mounted(model, adapter, factors)


def _draw(adapter: Adapter, layer: nn.Module, rng: torch.Generator, scale: float) -> FactorDict:
    assert isinstance(layer.weight, Tensor)
    dtype = plan.factor_dtype(layer.weight)
    start = adapter.init(layer.weight.detach().to("cpu", dtype), rng)
    return FactorDict(
        {key: nn.Parameter((scale * value).to(layer.weight.device)) for key, value in start.items()}
    )


class Mounted:
    """One adapter on the layers of one model; what trains, saves and merges it."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, factors: Mapping[str, FactorDict]
    ) -> None:
        self.model = model
        self.adapter = adapter
        # Typed as what they are while mounted; merged and detached, they are ordinary layers.
        self.layers = {name: cast(Adapted, model.get_submodule(name)) for name in factors}
        self._factors = dict(factors)
        self._strength = 1.0
        self._base: dict[str, nn.Parameter] = {}  # the frozen weights, while merged
        self._state = "mounted"
        self._put_on()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_factors().values())

    def named_factors(self) -> dict[str, nn.Parameter]:
        """'layer.factor' -> the trainable parameter."""
        return {
            f"{name}.{key}": factor
            for name, factors in self._factors.items()
            for key, factor in factors.items()
        }

    @property
    def num_params(self) -> int:
        return sum(factor.numel() for factor in self.parameters())

    def factors(self, name: str) -> Factors:
        """The factors of one layer, by their names in the adapter."""
        if name not in self._factors:
            raise UserError(f"no adapted layer {name!r}{nearest(name, self._factors)}")
        return dict(self._factors[name].items())

    def base_weight(self, name: str) -> nn.Parameter:
        """The frozen weight of a layer, merged or not."""
        if name not in self.layers:
            raise UserError(f"no adapted layer {name!r}{nearest(name, self.layers)}")
        return self._base.get(name, self.layers[name].weight)

    def delta(self, name: str) -> Tensor:
        """W' - W of a layer as applied, strength included, with no rounding from a sum with W."""
        weight = self.base_weight(name)
        return plan.weight_delta(self.adapter, weight, self.factors(name), self._strength)

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """The Frobenius norm of each layer's delta."""
        norms = torch.stack([torch.linalg.vector_norm(self.delta(name)) for name in self.layers])
        return dict(zip(self.layers, norms.tolist(), strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """The factors alone, by 'layer.factor'; they share the parameters' memory."""
        return {name: factor.detach() for name, factor in self.named_factors().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take every factor from `state`, or nothing if one is missing, unknown or misshapen."""
        self._need("mounted", "load factors")
        ours = self.named_factors()
        for name in state:
            if name not in ours:
                raise UserError(f"no factor {name!r} is mounted{nearest(name, ours)}")
        for name, factor in ours.items():
            if name not in state:
                raise UserError(f"the factor {name!r} is missing from what is to be loaded")
            if state[name].shape != factor.shape:
                raise UserError(
                    f"the factor {name!r} has shape {tuple(factor.shape)} here and "
                    f"{tuple(state[name].shape)} in what is to be loaded"
                )
        for name, factor in ours.items():
            factor.copy_(state[name])

    @property
    def strength(self) -> float:
        """s in W + s * (W' - W)."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._need("mounted", "change the strength")
        if not math.isfinite(value):
            raise UserError(f"the strength of an adapter must be finite, got {value}")
        self._strength = float(value)
        for layer in self.layers.values():
            layer.strength = self._strength

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the block."""
        before, self.strength = self.strength, 0.0
        try:
            yield
        finally:
            self.strength = before

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapter into the weights; ordinary layers are left.

        In a half-precision model the merged weights are rounded once to that precision, which
        can lose most of a small delta.
        """
        self._need("mounted", "merge")
        for name, layer in self.layers.items():
            weight, factors = self.base_weight(name), self.factors(name)
            merged = plan.adapted_weight(self.adapter, weight, factors, self._strength)
            # Another parameter, not another value: a layer that shares the old one is no target.
            self._base[name] = weight
            layer.weight = nn.Parameter(merged.to(weight.dtype, copy=True), requires_grad=False)
        self._take_off()
        self._state = "merged"

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`: the frozen weights come back bit for bit, the factors on top of them."""
        self._need("merged", "unmerge")
        for name, layer in self.layers.items():
            weight, device = self._base[name], layer.weight.device
            weight.data = weight.data.to(device)  # the model may have moved meanwhile
            self._factors[name].to(device)
            layer.weight = weight
        self._base.clear()
        self._put_on()
        self._state = "mounted"

    def detach(self) -> None:
        """Take the adapter off for good: ordinary layers with the weights they had."""
        if self._state == "merged":
            self.unmerge()
        self._need("mounted", "detach")
        self._take_off()
        self._state = "detached"

    def _put_on(self) -> None:
        for name, layer in self.layers.items():
            layer.__class__ = _adapted_type(type(layer))
            layer.adapter = self.adapter
            layer.strength = self._strength
            layer.factors = self._factors[name]

    def _take_off(self) -> None:
        for layer in self.layers.values():
            layer.__class__ = cast(type[Adapted], type(layer).__bases__[1])
            del layer.adapter, layer.strength, layer.factors

    def _need(self, state: str, act: str) -> None:
        if self._state != state:
            remedies = {"merged": "unmerge() it first", "mounted": "merge() it first"}
            remedy = remedies.get(self._state, "attach it again")
            raise UserError(f"cannot {act}: the adapter is {self._state}; {remedy}")
