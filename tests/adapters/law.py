"""The law that every adapter obeys on every layer, with every option:

    forward = merged = scaled by a strength = saved and reloaded

each against the frozen layer with W + (W' - W) in float64, where W' - W is the adapter's `delta` of
its factors and nothing of mount.py, layers.py or plan.py has a part in it.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.mount import Mounted, attach
from lyco_lab.adapters.options import Options
from lyco_lab.errors import UserError
from lyco_lab.formats import kohya
from tests.strategies import adapters_on, layer_and_input, layers_for, move, seeds

VALUES = {torch.float32: 1e-6, torch.float64: 1e-12}  # largest relative error of an output
GRADIENTS = {torch.float32: 1e-5, torch.float64: 1e-11}  # of a gradient, ten times the sums' terms


@dataclass(frozen=True)
class Case:
    adapter: Adapter
    geometry: str
    options: Options
    strength: float
    dtype: torch.dtype
    seed: int

    def layer(self) -> tuple[nn.Module, Tensor]:
        layer, x = layer_and_input(self.geometry, self.seed)
        return layer.to(self.dtype), x.to(self.dtype) if x.is_floating_point() else x

    def mounted(self) -> tuple[nn.Sequential, Mounted, Tensor]:
        layer, x = self.layer()
        model = nn.Sequential(layer)
        mounted = attach(model, self.adapter, ["0"], seed=self.seed % 1000, options=self.options)
        move(mounted, self.seed)
        mounted.eval()
        mounted.strength = self.strength
        return model, mounted, x


@st.composite
def cases(draw: st.DrawFn, cls: type[Adapter]) -> Case:
    geometry = draw(st.sampled_from(layers_for(cls)))
    layer, _ = layer_and_input(geometry, 0)
    adapter = draw(adapters_on(cls, tuple(layer.weight.shape)))
    options = Options(use_scalar=draw(st.booleans()), rank_dropout=draw(st.sampled_from([0, 0.5])))
    try:
        options.check(adapter, tuple(layer.weight.shape), type(layer).__name__)
    except UserError:
        options = Options()
    if getattr(adapter.inner, "alpha", None) == getattr(adapter.inner, "rank", 0):
        reject()  # gamma = 1 would hide that it is left out, or taken twice
    strength = draw(st.sampled_from([1.0, 1.0, 0.5, -1.5, 0.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return Case(adapter, geometry, options, strength, dtype, draw(seeds))


def by_definition(case: Case, mounted: Mounted, x: Tensor, factors: dict[str, Tensor]) -> Tensor:
    """The layer's output in float64, of factors in float64."""
    plain, _ = case.layer()
    plain = plain.double()
    adapter, rule = case.adapter, dict(factors)
    offset, scalar = rule.pop("bias", None), rule.pop("scalar", None)
    if scalar is not None:
        rule |= {name: scalar * rule[name] for name in adapter.inner.scaling if name in rule}
    outside = case.strength
    if adapter.scaling:
        rule |= {name: case.strength * rule[name] for name in adapter.scaling if name in rule}
        outside = 1.0
    weight = plain.weight.detach()
    state = {"weight": weight + outside * adapter.delta(weight, rule)}
    bias = getattr(plain, "bias", None)
    if bias is not None:
        state["bias"] = bias.detach()
        if offset is not None:
            state["bias"] = state["bias"] + case.strength * offset
    return torch.func.functional_call(plain, state, (x.double() if x.is_floating_point() else x,))


def double(mounted: Mounted) -> dict[str, Tensor]:
    return {
        name: factor.detach().double().requires_grad_(factor.requires_grad)
        for name, factor in mounted.factors("0").items()
    }


def check_values(case: Case, folder: Path) -> None:
    """forward = merged = saved and reloaded = the definition at this strength."""
    model, mounted, x = case.mounted()
    base = copy.deepcopy(case.layer()[0])
    bound = VALUES[case.dtype]
    with torch.no_grad():
        expected = by_definition(case, mounted, x, double(mounted))
        forward = model(x)
        assert error(forward, expected) <= bound, "forward"
        if case.strength == 0.0:
            assert torch.equal(forward, base(x)), "strength 0"
        mounted.merge()
        assert type(model[0]) is type(base)
        assert error(model(x), expected) <= bound, "merged"
        mounted.unmerge()
        assert torch.equal(model[0].weight, base.weight), "unmerged"
        assert torch.equal(model(x), forward), "after unmerging"
        kohya.save(folder / "law.safetensors", {"unet": mounted}, {})
        again = nn.Sequential(copy.deepcopy(base))
        reloaded = kohya.apply(folder / "law.safetensors", {"unet": again})["unet"]
        reloaded.eval()
        reloaded.strength = case.strength
        assert reloaded.adapter_of("0") == case.adapter
        assert error(again(x), expected) <= bound, "reloaded"
        mounted.merge(keep_base=False)
        assert error(model(x), expected) <= bound, "merged in place"


def check_gradients(case: Case) -> None:
    """Of the input and of every factor, against autograd through the definition."""
    model, mounted, x = case.mounted()
    names = [name for name, factor in mounted.factors("0").items() if factor.requires_grad]
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    y = model(x)
    rng = torch.Generator().manual_seed(case.seed)
    direction = torch.randn(y.shape, dtype=torch.float64, generator=rng)
    wanted = [*inputs, *(mounted.factors("0")[name] for name in names)]
    if y.requires_grad:
        got = torch.autograd.grad((y * direction.to(y.dtype)).sum(), wanted, allow_unused=True)
    else:  # at strength 0, of a layer whose input is numbers of rows
        got = (None,) * len(wanted)
    factors, x_64 = double(mounted), x.detach()
    inputs_64 = [x_64 := x_64.double().requires_grad_()] if x_64.is_floating_point() else []
    y_64 = by_definition(case, mounted, x_64, factors)
    wanted_64 = [*inputs_64, *(factors[name] for name in names)]
    # Relative to the largest gradient of a few directions: that of one may cancel by accident, and
    # has then only the noise of its terms.
    directions = [direction, *(torch.randn(y.shape, generator=rng).double() for _ in range(3))]
    found = [
        torch.autograd.grad(y_64, wanted_64, d, allow_unused=True, retain_graph=True)
        for d in directions
    ]
    norms = [[0.0 if g is None else float(g.norm()) for g in gradients] for gradients in found]
    sizes = [max(of_one) for of_one in zip(*norms, strict=True)]
    names = ["x"] * len(inputs) + names
    for name, one, other, size in zip(names, got, found[0], sizes, strict=True):
        if one is None or other is None:
            assert one is other is None or not (one if other is None else other).any(), name
            continue
        off = float((one.double() - other).norm())
        bound = GRADIENTS[case.dtype] * (size + 1e-2 * max(sizes))
        assert off <= bound, f"{name}: off by {off:.3g}, bound {bound:.3g}"


def error(one: Tensor, other: Tensor) -> float:
    """Relative, in the norm."""
    return float((one.double() - other).norm() / other.norm())
