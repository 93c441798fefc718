"""Which layers of a model names and patterns stand for, and whether they can be adapted.

Everything that can be wrong with a request is found here, before a model is changed.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lyco_lab import waits
from lyco_lab.adapters import adapted_layer, merging, plan
from lyco_lab.adapters.adapted_layer import MATRICES, NORMS
from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.options import Options, Override
from lyco_lab.adapters.shapes import Shape
from lyco_lab.errors import UserError, nearest

SUPPORTED = (*MATRICES, nn.MultiheadAttention, *NORMS)
WILD = set("*?[")


@dataclass(frozen=True)
class Target:
    """One layer and what it is to carry."""

    name: str
    layer: nn.Module
    adapter: Adapter
    lr: float | None

    @property
    def shape(self) -> Shape:
        return adapted_layer.shape_of(self.layer)

    @property
    def num_params(self) -> int:
        bias = merging.original(self.layer).bias
        offset = bias.numel() if self.adapter.trains_bias() and bias is not None else 0
        return self.adapter.num_params(self.shape) + offset


def resolve(
    model: nn.Module,
    adapter: Adapter,
    targets: str | Iterable[str],
    options: Options,
    overrides: Mapping[str, Override],
) -> list[Target]:
    """The layers that names and patterns stand for, each checked, in the order of the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    listed = [targets] if isinstance(targets, str) else list(targets)
    names = _names(model, adapter, modules, listed)
    used: set[str] = set()
    seen: dict[int, str] = {}
    resolved = []
    for name in names:
        layer, chosen, lr = modules[name], adapter, None
        if id(layer) in seen:
            raise UserError(
                f"the layer {name!r} is the same layer as {seen[id(layer)]!r}: "
                "name each layer to adapt once"
            )
        seen[id(layer)] = name
        for pattern, override in overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                used.add(pattern)
                chosen = override.of(chosen)
                lr = lr if override.lr is None else override.lr
        _check_layer(name, layer, chosen, options)
        resolved.append(Target(name, layer, chosen, lr))
    for pattern in overrides:
        if pattern not in used:
            raise UserError(
                f"the override {pattern!r} matches none of the {len(names)} adapted layers"
                f"{nearest(pattern, names)}"
            )
    return resolved


def _names(
    model: nn.Module, adapter: Adapter, modules: Mapping[str, nn.Module], targets: list[str]
) -> list[str]:
    kind = type(model).__name__
    found: dict[str, None] = {}
    for target in targets:
        if not WILD & set(target):
            if target not in modules:
                raise UserError(f"{kind} has no layer {target!r}{nearest(target, modules)}")
            if target in found:
                raise UserError(
                    f"the layer {target!r} is named twice: name each layer to adapt once"
                )
            found[target] = None
            continue
        matching = [
            name
            for name, layer in modules.items()
            if fnmatch.fnmatchcase(name, target) and isinstance(layer, SUPPORTED)
        ]
        if not matching:
            raise UserError(
                f"the pattern {target!r} matches no layer of {kind} that can be adapted"
                f"{nearest(target, modules)}"
            )
        found |= dict.fromkeys(matching)
    if not found:
        raise UserError(f"no layer of {kind} was named for {adapter}: name at least one")
    order = {name: index for index, name in enumerate(modules)}
    return sorted(found, key=lambda name: order[name])


def _check_layer(name: str, layer: nn.Module, adapter: Adapter, options: Options) -> None:
    kind = layer.__class__.__name__.removeprefix("Adapted")
    where = f"cannot put {type(adapter).__name__} on the layer {name!r}"
    norm, opaque = isinstance(layer, NORMS), adapted_layer.is_opaque(layer)
    sized = all(isinstance(getattr(layer, k, None), int) for k in ("in_features", "out_features"))
    if not isinstance(layer, SUPPORTED) and not sized:
        needed = ", ".join(one.__name__ for one in SUPPORTED)
        raise UserError(
            f"{where}: it is a {kind}, and an adapter needs one of {needed}, or a layer that "
            "tells its in_features and out_features; leave it out"
        )
    if norm != (adapter.takes == "norm"):
        needs = "norm layers" if adapter.takes == "norm" else "layers that multiply by a matrix"
        raise UserError(f"{where}: it is a {kind}, and this adapter is for {needs}; leave it out")
    if opaque and adapter.reads_weight:
        raise UserError(
            f"{where}: it is a {kind}, whose weight cannot be read, and this adapter needs to; "
            "use one that only multiplies by it, such as LoRA"
        )
    for carried in getattr(layer, "mounts", ()):
        if carried.adapter == adapter:
            raise UserError(
                f"the layer {name!r} already carries {adapter}: detach it first, or train that"
            )
    if merging.original(layer).merged and adapter.uses_base:
        raise UserError(f"{where}: an adapter is merged into it; unmerge() that first")
    weight = None if opaque else layer._parameters.get(adapted_layer.weight_name(layer))
    if isinstance(layer, nn.MultiheadAttention):
        _check_attention(where, layer)
    if weight is None and not opaque:
        raise UserError(f"{where}: this {kind} has no weight; leave it out")
    if adapter.trains_bias() and opaque:
        raise UserError(f"{where}: the bias of a {kind} cannot be moved; leave it out")
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise UserError(f"{where}: its max_norm changes the weight in use; leave it out")
    shape = adapted_layer.shape_of(layer)
    try:
        adapter.check(shape)
        options.check(adapter, shape, kind)
    except ValueError as error:
        raise UserError(f"layer {name!r} of shape {shape}: {error}") from error
    if weight is not None and weight.device.type != "meta" and not _all_finite(weight):
        raise UserError(f"{where}: its weight holds numbers that are not finite; load it again")


def _check_attention(where: str, layer: nn.MultiheadAttention) -> None:
    ours = isinstance(layer, adapted_layer.Adapted)
    if not ours and type(layer).forward is not nn.MultiheadAttention.forward:
        raise UserError(f"{where}: a {type(layer).__name__} has a forward of its own; leave it out")
    if layer.in_proj_weight is None:
        raise UserError(
            f"{where}: its kdim {layer.kdim} or vdim {layer.vdim} is not its embed_dim "
            f"{layer.embed_dim}, so that queries, keys and values have no in_proj_weight in "
            "common to adapt; leave it out, its out_proj can be adapted"
        )


@torch.no_grad()
def _all_finite(weight: Tensor) -> bool:
    # One pass and no temporary; a sum that overflows says nothing yet.
    total = waits.host(weight.sum(dtype=plan.factor_dtype(weight.dtype)), "weights")
    return bool(torch.isfinite(total)) or bool(waits.host(torch.isfinite(weight).all(), "weights"))
