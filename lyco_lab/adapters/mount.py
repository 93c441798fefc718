"""Put adapters on the layers of a model, and take them off again.

    mounted = attach(unet, LoRA(rank=8), ["*.attn?.to_*"], seed=0)  # frozen, only factors train
    mounted.strength = 0.5                                # W + 0.5 * (W' - W); 0 is W exactly
    mounted.merge()                                       # ordinary layers that hold W'
    mounted.unmerge()                                     # W bit for bit, and the factors on it
    mounted.detach()                                      # the model as it was, still frozen

Several adapters may stand on one layer: each changes the frozen weight, and the changes add up,

    W + sum_i strength_i * (W_i' - W)

A layer keeps its name, its parameters and its type in the sense of `isinstance`.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lyco_lab import waits
from lyco_lab.adapters import adapted_layer, geometry, layer_adapter, layers, merging, plan
from lyco_lab.adapters.adapted_layer import Adapted
from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.kernel import Sizes
from lyco_lab.adapters.layer_adapter import BIAS, FactorDict, Mount
from lyco_lab.adapters.options import SCALAR, Options, Override
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.adapters.targeting import Target, resolve
from lyco_lab.errors import UserError, nearest
from lyco_lab.linalg import kaiming
from lyco_lab.seeds import derive, generator


def survey(
    model: nn.Module,
    adapter: Adapter,
    targets: str | Iterable[str],
    *,
    options: Options | None = None,
    overrides: Mapping[str, Override] | None = None,
) -> dict[str, int]:
    """How many parameters train on each layer. Makes `attach`'s checks, and changes nothing."""
    resolved = resolve(model, adapter, targets, options or Options(), overrides or {})
    scalar = 1 if options is not None and options.use_scalar else 0
    return {target.name: target.num_params + scalar for target in resolved}


def attach(
    model: nn.Module,
    adapter: Adapter,
    targets: str | Iterable[str],
    *,
    seed: int,
    options: Options | None = None,
    overrides: Mapping[str, Override] | None = None,
    init_scale: float | Callable[[str, str], float] = 1.0,
    dtype: torch.dtype = torch.float32,
) -> "Mounted":
    """Freeze `model` and train `adapter` on the layers that names or patterns in `targets` match.

    Patterns have `*`, `?` and `[...]` and match whole names of layers that can be adapted;
    `overrides` says by such patterns what differs on some of them, the last match winning. A
    layer's factors depend on the seed and its name alone, so they are the same on any device and
    whatever other layers are adapted. `init_scale`, a number or a function of the names of layer
    and factor, multiplies every factor of the rule. `dtype` is that of the factors; at least the
    layer's is taken where that is float32 or float64.

    Raises `UserError`, before anything is changed, for a name or pattern without a layer, one
    layer twice, a layer that the adapter or an option cannot take, or a weight that is not finite.
    """
    options = options or Options()
    resolved = resolve(model, adapter, targets, options, overrides or {})
    scales = {target.name: _scales(target, init_scale) for target in resolved}
    needs_clock = options.draws or any(t.adapter.inner.draws() for t in resolved)
    timed = any(target.adapter.inner.needs_timestep() for target in resolved)
    timesteps = _timestep_argument(model, resolved) if timed else None
    for module in model.modules():
        if not isinstance(module, FactorDict):  # another adapter on this model keeps training
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    clock = torch.zeros(2, dtype=torch.int64)
    mounts = {
        target.name: _mount(target, options, seed, scales[target.name], clock, dtype)
        for target in resolved
    }
    mounted = Mounted(model, adapter, mounts, {t.name: t.lr for t in resolved}, clock)
    if needs_clock:
        mounted.hooks.append(model.register_forward_pre_hook(_Tick(clock)))
    if timesteps is not None:
        gate = _Gate(list(mounts.values()), timesteps)
        mounted.hooks.append(model.register_forward_pre_hook(gate, with_kwargs=True))
    return mounted


def _scales(target: Target, init_scale: float | Callable[[str, str], float]) -> dict[str, float]:
    """What multiplies the start of each factor that is scaled.

    The untrained as well: a term counts all its factors. Not what wraps the rule, as a magnitude
    does, which stands where the frozen weight put it.
    """
    scales = {}
    for name in target.adapter.inner.factor_shapes(target.shape):
        scale = init_scale(target.name, name) if callable(init_scale) else init_scale
        if not math.isfinite(scale) or scale == 0:
            place = f"factor {name!r} of layer {target.name!r}"
            raise UserError(f"init_scale of {place} must be finite and not 0, got {scale}")
        scales[name] = scale
    return scales


def _mount(
    target: Target,
    options: Options,
    seed: int,
    scales: Mapping[str, float],
    clock: Tensor,
    dtype: torch.dtype,
) -> Mount:
    layer, adapter = target.layer, target.adapter
    reference = adapted_layer.reference_tensor(layer)
    computing = plan.factor_dtype(reference.dtype)
    rng = generator(seed, "adapter", target.name)
    original = merging.original(layer)
    if adapted_layer.is_opaque(layer):
        weight = torch.empty(target.shape, device="meta", dtype=computing)
        start = _on_cpu(adapter, weight, rng)
    else:
        start = adapter.init(waits.host(original.weight, "weights").to(computing), rng)
    if options.use_scalar:
        for name, factor in start.items():
            if name not in adapter.untrained and not factor.any():
                fan_in = max(1, factor[0].numel())
                start[name] = kaiming(factor, *factor.shape, fan_in=fan_in, rng=rng)
        start[SCALAR] = torch.zeros((), dtype=computing)
    if adapter.trains_bias() and original.bias is not None:
        start[BIAS] = torch.zeros(original.bias.shape, dtype=computing)
    kept = dtype if computing == torch.float32 else computing
    factors = FactorDict(
        {
            name: nn.Parameter(
                (scales.get(name, 1.0) * value).to(reference.device, kept),
                requires_grad=name not in adapter.untrained,
            )
            for name, value in start.items()
        }
    )
    key = derive(seed, "dropout", target.name)
    mount = Mount(adapter, factors, options, key=key, clock=clock, dtype=computing)
    return mount.train(layer.training)


def _on_cpu(adapter: Adapter, weight: Tensor, rng: torch.Generator) -> Factors:
    """The start of an adapter that only asks its weight for a shape and a dtype."""
    return adapter.init(torch.empty((), dtype=weight.dtype).expand(weight.shape), rng)


class _Tick:
    """Counts forward passes of the model; a checkpointed block that runs again is not one."""

    def __init__(self, clock: Tensor) -> None:
        self.clock = clock

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.clock[0].add_(1)


class _Gate:
    """Tells adapters that ask for it the timestep at which the model is called."""

    def __init__(self, mounts: list[Mount], position: tuple[int, str]) -> None:
        self.mounts = mounts
        self.position = position

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        index, name = self.position
        timesteps = kwargs[name] if name in kwargs else args[index]
        timesteps = torch.as_tensor(timesteps).reshape(-1)
        for mount in self.mounts:
            if mount.adapter.inner.needs_timestep():
                mount.gates = mount.adapter.inner.gate(timesteps, mount.rule_factors())


def _timestep_argument(model: nn.Module, resolved: list[Target]) -> tuple[int, str]:
    """Where the model's forward takes its timestep."""
    names = list(inspect.signature(model.forward).parameters)
    if "timestep" not in names:
        adapter = next(t.adapter for t in resolved if t.adapter.inner.needs_timestep())
        raise UserError(
            f"{type(adapter).__name__} depends on the timestep, and {type(model).__name__} is "
            f"not called with one: its arguments are {', '.join(names)}"
        )
    return names.index("timestep"), "timestep"


@dataclass(frozen=True)
class Row:
    """One adapted layer, as `Mounted.explain` lists it."""

    name: str
    layer: str
    shape: Shape
    adapter: str
    params: int
    plan: str


class Mounted:
    """What one `attach` put on a model; it trains, saves and merges together."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        mounts: Mapping[str, Mount],
        rates: Mapping[str, float | None],
        clock: Tensor,
    ) -> None:
        self.model = model
        self.adapter = adapter
        # Typed as what they are while mounted; merged and detached, they are ordinary layers.
        self.layers = {name: cast(Adapted, model.get_submodule(name)) for name in mounts}
        self.hooks: list[Any] = []
        self._mounts = dict(mounts)
        self._rates = dict(rates)
        self._clock = clock
        self._strength = 1.0
        self._state = "mounted"
        self._put_on()

    def adapter_of(self, name: str) -> Adapter:
        """The adapter on one layer, overrides considered."""
        return self._mount(name).adapter

    def options_of(self, name: str) -> Options:
        return self._mount(name).options

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.named_factors().values() if p.requires_grad]

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: `lr`, except where an override says otherwise."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, mount in self._mounts.items():
            rate = self._rates[name]
            trained = [p for p in mount.factors.values() if p.requires_grad]
            groups.setdefault(lr if rate is None else rate, []).extend(trained)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]

    def named_factors(self) -> dict[str, nn.Parameter]:
        """'layer.factor' -> the parameter, trained or not."""
        return {
            f"{name}.{key}": factor
            for name, mount in self._mounts.items()
            for key, factor in mount.factors.items()
        }

    @property
    def num_params(self) -> int:
        return sum(factor.numel() for factor in self.parameters())

    def factors(self, name: str) -> Factors:
        """The factors of one layer, by their names in the adapter."""
        return dict(self._mount(name).factors.items())

    def rule_factors(self, name: str) -> Factors:
        """The factors as the adapter's rule sees them: `use_scalar`'s scalar is in them."""
        return merging.evaluated(self._mount(name), strength=1.0)

    def base_weight(self, name: str) -> nn.Parameter:
        """The frozen weight of a layer, merged or not."""
        self._mount(name)
        layer = self.layers[name]
        if adapted_layer.is_opaque(layer):
            kind = type(layer).__name__.removeprefix("Adapted")
            raise UserError(f"the weight of the layer {name!r}, a {kind}, cannot be read")
        return merging.original(layer).weight

    def _weight(self, name: str) -> Tensor:
        """What `delta` takes for W: only its shape, where W is not at hand and need not be read."""
        mount, layer = self._mount(name), self.layers[name]
        apart = adapted_layer.is_opaque(layer) or adapted_layer.is_shared_out(layer)
        if apart and not mount.adapter.uses_base:
            return torch.empty((), dtype=mount.dtype, device=layer.device).expand(
                adapted_layer.shape_of(layer)
            )
        return adapted_layer.gathered(self.base_weight(name))

    def base_bias(self, name: str) -> nn.Parameter | None:
        """The frozen bias of a layer, merged or not."""
        self._mount(name)
        return merging.original(self.layers[name]).bias

    def delta(self, name: str) -> Tensor:
        """W' - W of a layer as applied, strength included, with no rounding from a sum with W."""
        return merging.weight_delta(self._mount(name), self._weight(name))

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """The Frobenius norm of each layer's delta."""
        norms = torch.stack([torch.linalg.vector_norm(self.delta(name)) for name in self.layers])
        return dict(zip(self.layers, waits.host(norms, "norms").tolist(), strict=True))

    @torch.no_grad()
    def limit_norms(self) -> None:
        """Scale each update down to `max_norm` where its Frobenius norm exceeds that.

        Exact in one step where the scaled factors scale the update; a rotation is turned back by
        bisection, to a norm at most `max_norm`. Nothing is copied to the host.
        """
        for name, mount in self._mounts.items():
            largest = mount.options.max_norm
            if largest is None:
                continue
            weight = self._weight(name)

            def norm(
                share: Tensor | float, mount: Mount = mount, weight: Tensor = weight
            ) -> Tensor:
                return torch.linalg.vector_norm(merging.weight_delta(mount, weight, strength=share))

            whole = norm(1.0)
            if layer_adapter.is_linear(mount.adapter):
                share = torch.where(whole > largest, largest / whole, 1.0)
            else:
                low, high = torch.zeros_like(whole), torch.ones_like(whole)
                for _ in range(24):
                    middle = (low + high) / 2
                    fits = norm(middle) <= largest
                    low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
                share = torch.where(whole > largest, low, 1.0)
            scaled = SCALAR if SCALAR in mount.factors else None
            for key in [scaled] if scaled else mount.adapter.scaling:
                if key in mount.factors:
                    mount.factors[key].mul_(share.to(mount.factors[key].dtype))

    def explain(self, tokens: int | None = None) -> list[Row]:
        """Every layer with its adapter, shape, parameters and, at so many tokens, its plan."""
        rows = []
        for name, mount in self._mounts.items():
            layer, shape = self.layers[name], adapted_layer.shape_of(self.layers[name])
            op = geometry.of(layer)
            kernel = plan.kernel_of(mount.adapter, op, shape)
            chosen = ""
            if tokens is not None and mount.adapter.takes == "matrix":
                sizes = Sizes(tokens, shape[0], math.prod(shape[1:]))
                chosen = str(plan.choose(kernel.costs(sizes)))
            rows.append(
                Row(
                    name=name,
                    layer=type(layer).__name__.removeprefix("Adapted"),
                    shape=shape,
                    adapter=str(mount.adapter),
                    params=sum(p.numel() for p in mount.factors.values() if p.requires_grad),
                    plan=chosen,
                )
            )
        return rows

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
        """s in W + s * (W' - W); what it means for a rotation, the adapter's own file says."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._need("mounted", "change the strength")
        if not math.isfinite(value):
            raise UserError(f"the strength of an adapter must be finite, got {value}")
        self._strength = float(value)
        for mount in self._mounts.values():
            mount.strength = self._strength

    @contextlib.contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """Another strength inside the block."""
        before, self.strength = self.strength, strength
        try:
            yield
        finally:
            self.strength = before

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Without this adapter inside the block."""
        return self.at(0.0)

    def enabled(self) -> contextlib.AbstractContextManager[None]:
        """With this adapter at full strength inside the block."""
        return self.at(1.0)

    def train(self, mode: bool = True) -> "Mounted":
        """Whether dropouts act; the layers below stay in the mode they are in."""
        for mount in self._mounts.values():
            mount.train(mode)
        return self

    def eval(self) -> "Mounted":
        return self.train(False)

    @property
    def step(self) -> int:
        """Forward passes so far, of which what is drawn at random depends."""
        return int(self._clock[0])

    @step.setter
    def step(self, value: int) -> None:
        self._clock[0].fill_(value)

    @property
    def part(self) -> int:
        """Which of the parts, of one size, of a step's samples the model sees.

        Dropout of inputs depends on it: parts have the masks that they would have together.
        """
        return int(self._clock[1])

    @part.setter
    def part(self, value: int) -> None:
        self._clock[1].fill_(value)

    @property
    def is_one_weight(self) -> bool:
        """Whether W' is the same at every call, and so can be merged."""
        return not any(m.adapter.inner.needs_timestep() for m in self._mounts.values())

    @torch.no_grad()
    def merge(self, *, keep_base: bool = True) -> None:
        """Fold the adapter into the weights; ordinary layers are left.

        The sum is formed in float32 or better and rounded once, which in a half-precision model
        can lose most of a small delta. With `keep_base` the frozen weights are kept aside, so that
        `unmerge` brings them back; without, they are overwritten in place, which takes the memory
        of one layer's change at a time.

        Raises `UserError`, and leaves the model as it was, where a layer cannot be merged, or a
        sum is no finite number in the model's precision.
        """
        self._need("mounted", "merge")
        for name, layer in self.layers.items():
            if layer.opaque:
                raise UserError(
                    f"cannot merge: the weight of layer {name!r}, a "
                    f"{type(layer).__name__.removeprefix('Adapted')}, cannot be written"
                )
            if self._mount(name).adapter.inner.needs_timestep():
                raise UserError(f"cannot merge: the update of {name!r} depends on the timestep")
            for other in cast(list[Mount], list(layer.mounts)):
                if other is not self._mounts[name] and (other.adapter.uses_base or not keep_base):
                    raise UserError(
                        f"cannot merge: the layer {name!r} also carries {other.adapter}, "
                        "which changes the frozen weight: merge or detach that first"
                    )
        if keep_base:
            self._each("merge", merging.merge)
        else:  # nothing could be undone, so all is tried first
            self._each("merge", merging.check_merge)
            for name, layer in self.layers.items():
                merging.merge_in_place(layer, self._mounts[name])
        for name, layer in self.layers.items():
            layers.take_off(layer, self._mounts[name])
            layers.settle(self.model, name)
        self._state = "merged" if keep_base else "merged in place"

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`: the frozen weights come back bit for bit, the factors on top of them.

        Raises `UserError`, and leaves the model as it was, where other adapters are merged into a
        layer whose sum without this one is no finite number in the model's precision.
        """
        self._need("merged", "unmerge")
        self._each("unmerge", merging.unmerge)
        self._put_on()
        self._state = "mounted"

    def detach(self) -> None:
        """Take the adapter off for good: ordinary layers with the weights they had."""
        if self._state == "merged":
            self.unmerge()
        self._need("mounted", "detach")
        for name, layer in self.layers.items():
            layers.take_off(layer, self._mounts[name])
            layers.settle(self.model, name)
        for hook in self.hooks:
            hook.remove()
        self._state = "detached"

    def _each(self, act: str, do: Callable[[nn.Module, Mount], None]) -> None:
        """Do something to all layers, or to none of them where it overflows."""
        restorers = [merging.restorer(layer) for layer in self.layers.values()]
        for name, layer in self.layers.items():
            try:
                do(layer, self._mounts[name])
            except merging.Overflow as error:
                for restore in restorers:
                    restore()
                raise UserError(
                    f"cannot {act}: the layer {name!r} {error}; {act} in a model of float32, or "
                    "at a smaller strength"
                ) from error

    def _put_on(self) -> None:
        for name, layer in self.layers.items():
            layers.put_on(layer, self._mounts[name])
            layers.settle(self.model, name)

    def _mount(self, name: str) -> Mount:
        if name not in self._mounts:
            raise UserError(f"no adapted layer {name!r}{nearest(name, self._mounts)}")
        return self._mounts[name]

    def _need(self, state: str, act: str) -> None:
        if self._state != state:
            remedies = {"merged": "unmerge() it first", "mounted": "merge() it first"}
            remedy = remedies.get(self._state, "attach it again")
            raise UserError(f"cannot {act}: the adapter is {self._state}; {remedy}")
