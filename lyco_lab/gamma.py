"""The gamma theorem as code: which runs are the same run, and how to get from one to another.

An adapter trains W' = W + gamma * T(A_1, ..., A_n), where T is a sum of terms, each linear in every
one of its factors. Scale each factor by an s_i > 0 of its own, such that the product over the
factors of every term is gamma / gamma'. Then the run with gamma' whose

    factors start at            s_i * A_i
    settings are                x * s_i**p,     p the power that the optimizer claims for x
    norm of gradients counts    s_i * |g_i|

has the same W' at every step as the run with gamma, hence the same losses and images. The powers
are claims of lyco_lab/optimizers (lr moves by s**2 for SGD and by s for Adam, eps by 1 / s, ...),
the terms are claims of lyco_lab/adapters; theory/ derives both, theory/gauge.py proves this.

With all s_i of a layer equal this is the theorem of the paper: s = gamma**(1/m), m the degree of
the layer, which belongs to the layer and not to the adapter's name (LoKr has 2 where its right
block is a full matrix and 3 where it is factored). With all of it on a factor that starts at 0 it
says that gamma is a ratio of learning rates and nothing else.

When every s_i is a power of two, scaling is exact in binary floating point, and the two runs agree
bit for bit; else they agree up to rounding, which training may amplify. Runs that add up on other
numbers of devices, or on other processors, agree up to the rounding of sums; and where a layer
subtracts an untrained factor from the one that it is a copy of (Adapter.twins), so do runs that
scale the two differently.

A power of two is exact while no number leaves the normal range of float32, 2^-126 to 2^127. What
leaves it first are squares: optimizers hold g^2, of which gradients that are 2^k times smaller make
4^k times smaller ones. With s <= 2^24 = 2^SCALE_BITS, the square of a gradient of 2^-39 (2e-12) is
still normal. A smaller one has a square that is rounded to a multiple of 2^-149; in units of the
gradients of the run with gamma = 1 that moves its root by at most 2^-75 s = 2^-51, and the eps of
1e-8 to which the root is added has no digit below 2^-50. Besides, T is formed without gamma, and
gradients pass through T multiplied by gamma: with gamma >= 2^-48 = 2^-GAMMA_BITS, gradients of
W' down to 2^-78 stay normal; and upwards entries of T that are as small do. Outside these bounds
nothing is claimed of two runs with different scales.

Reference: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
(Yeh et al., 2024), Theorem 1, https://arxiv.org/abs/2309.14859
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lyco_lab import adapters, optimizers
from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.layer_adapter import BIAS
from lyco_lab.adapters.merging import original
from lyco_lab.adapters.options import SCALAR, Options
from lyco_lab.adapters.shapes import Terms
from lyco_lab.adapters.targeting import resolve
from lyco_lab.config import Model, Run, Train
from lyco_lab.config.groups import PLAIN, Group, group_of
from lyco_lab.diffusion import targets
from lyco_lab.diffusion.skeleton import parts, skeleton
from lyco_lab.errors import UserError
from lyco_lab.miniature import placed
from lyco_lab.optimizers.base import Optimizer
from lyco_lab.record import identity

CARRIERS = ("all", "zero")
SCALE_BITS, GAMMA_BITS = 24, 48  # the largest |log2| of a scale, and of gamma, with a claim
SAME = 1e-9  # relative difference at which two settings are one, written or rounded differently

Place = tuple[str, str]  # a factor: (part.layer, its name)
Scales = dict[Place, float]  # s_i


def scale(gamma: float, degree: int) -> float:
    """s = gamma ** (1 / degree), exact whenever s is a power of two."""
    if not (math.isfinite(gamma) and gamma > 0):
        raise UserError(f"gamma must be finite and positive to be folded away, got {gamma}")
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise UserError(f"the degree of homogeneity must be an integer >= 1, got {degree}")
    mantissa, exponent_plus_1 = math.frexp(gamma)
    if mantissa == 0.5 and (exponent_plus_1 - 1) % degree == 0:
        # 1 / degree is rounded, so the power below may miss by one unit in the last place, and
        # with it the bitwise equality of the two runs.
        return math.ldexp(1.0, (exponent_plus_1 - 1) // degree)
    return float(gamma ** (1.0 / degree))


def is_power_of_two(s: float) -> bool:
    """Whether multiplying by `s` is exact in binary floating point."""
    return s > 0 and math.isfinite(s) and math.frexp(s)[0] == 0.5


@dataclass(frozen=True)
class Layer:
    """A layer that a run adapts, as the theorem sees it."""

    name: str  # part.layer
    adapter: Adapter
    beside: bool  # a norm layer beside the run's adapter, with a gamma of its own that stays
    gamma: float | None
    terms: Terms
    zero: tuple[str, ...]  # the factors that start at 0
    scaled: tuple[str, ...]  # those that init_scale multiplies
    others: tuple[str, ...]  # that train and stand in no term: a magnitude, an offset of the bias

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*(f for term in self.terms for f in term), *self.others)))


def layers(run: Run) -> tuple[Layer, ...]:
    """The layers that the run adapts; needs the model's configuration, not its weights."""
    return _layers(run.model, run.adapter_value(), run.options)


@functools.lru_cache(maxsize=256)
def _layers(model: Model, adapter: Adapter, options: Options) -> tuple[Layer, ...]:
    found = []
    for part in parts(placed(model), model.text_encoder):
        network = skeleton(placed(model), part)
        chosen = targets.chosen(network, part, model, adapter)
        for target in resolve(network, adapter, chosen.names, options, chosen.overrides):
            own, shape = target.adapter, target.shape
            terms = options.terms(own, shape)
            within = {factor for term in terms for factor in term}
            every = dict.fromkeys(own.factor_shapes(shape))
            if own.trains_bias() and original(target.layer).bias is not None:
                every[BIAS] = None
            if options.use_scalar:
                every[SCALAR] = None
            found.append(
                Layer(
                    name=f"{part}.{target.name}",
                    adapter=own,
                    beside=target.name in chosen.norms,
                    gamma=own.gamma(shape),
                    terms=terms,
                    zero=options.zero(own),
                    scaled=tuple(own.inner.factor_shapes(shape)),
                    others=tuple(name for name in every if name not in within),
                )
            )
    return tuple(found)


def rewrite(
    run: Run,
    gamma: float = 1.0,
    *,
    carry: str = "all",
    powers: Mapping[str, int] | None = None,
) -> Run:
    """The run with this gamma on every layer of its adapter that trains the same W' as `run`.

    `carry` says which factors take the difference: "all" of a layer alike, as in the paper, or
    "zero", those that start at 0, so that the start stays as it is. `powers` of the optimizer's
    settings other than those it claims give another run, to compare with.

    Raises `UserError` where there is no such run: the adapter's update is not homogeneous, the
    optimizer has no exact transformation, or it needs one scale for factors that need several.
    """
    if carry not in CARRIERS:
        raise UserError(f"carry is {carry!r}, needs one of {', '.join(CARRIERS)}")
    if not (math.isfinite(gamma) and gamma > 0):
        raise UserError(f"gamma must be finite and positive, got {gamma}")
    why = obstacle(run)
    if why:
        raise UserError(f"gamma of run {run.name!r} cannot be moved: {why}")
    scales = scales_to(run, gamma, carry=carry)
    return transformed(run, scales, run.adapter_value().with_gamma(gamma), powers)


def scales_to(run: Run, gamma: float, *, carry: str = "all") -> Scales:
    """The s_i that leave this gamma on the adapter's layers, in a run whose gamma can be moved."""
    scales: Scales = {}
    for layer in layers(run):
        assert layer.gamma is not None
        ratio = 1.0 if layer.beside else layer.gamma / gamma
        for term in layer.terms:
            carriers = [name for name in term if carry == "all" or name in layer.zero]
            if not carriers:
                kind = type(layer.adapter).__name__
                raise UserError(
                    f"gamma of run {run.name!r} cannot be carried by factors that start at 0: "
                    f"{kind} has a term without any ({', '.join(term)}); use carry='all'"
                )
            s = scale(ratio, len(carriers))
            scales |= {(layer.name, name): s if name in carriers else 1.0 for name in term}
    return scales


def obstacle(run: Run) -> str:
    """Why no gamma of this run can be moved anywhere; "" where it can."""
    rule = run.optimizer_value()
    if run.trainer.callbacks:
        return "what its trainer.callbacks do to what is trained is not known"
    if run.embedding.token is not None:
        return "the vector of a token trains beside the factors, and no scaling of them moves it"
    if rule.no_gamma:
        return f"{type(rule).__name__} admits no exact transformation: {rule.no_gamma}"
    for layer in layers(run):
        if not layer.terms:
            return (
                f"the update of {type(layer.adapter).__name__} is not homogeneous: "
                f"{layer.adapter.no_degree}"
            )
    return ""


def transformed(
    run: Run,
    scales: Mapping[Place, float],
    adapter: Adapter,
    powers: Mapping[str, int] | None = None,
) -> Run:
    """`run` with each factor scaled as given (those that are not: by 1), and this adapter.

    The scale that most factors have goes into the settings of the run, and what differs from it
    into groups.
    """
    rule = run.optimizer_value()
    each = _everywhere(run, scales)
    distinct = set(each.values())
    if len(distinct) > 1 and rule.one_scale:
        raise UserError(
            f"gamma of run {run.name!r} cannot be moved: its factors need the scales "
            f"{', '.join(f'{s:.6g}' for s in sorted(distinct))}, and {type(rule).__name__} takes "
            f"one for all: {rule.one_scale}"
        )
    counts = Counter(each.values())
    common = max(counts, key=lambda s: (counts[s], s == 1))
    powers = rule.powers if powers is None else powers
    base = _scaled(PLAIN, common, powers)
    if len(distinct) == 1:
        return _expressed(run, adapter, base, run.train.groups)
    return _expressed(run, adapter, base, _groups(run, _moved_groups(run, each, powers), base))


def _everywhere(run: Run, scales: Mapping[Place, float]) -> Scales:
    """A scale for each factor of the run: 1 where none is given."""
    places = [(layer.name, name) for layer in layers(run) for name in layer.factors]
    return {place: scales.get(place, 1.0) for place in places}


def _scaled(group: Group, s: float, powers: Mapping[str, int]) -> Group:
    """A group's multiples for factors that are `s` times as large."""
    settings = {
        key: group.optimizer.get(key, 1.0) * s**power
        for key, power in powers.items()
        if key != "lr"
    }
    return Group(
        init_scale=group.init_scale * s,
        lr=group.lr * s ** powers.get("lr", 0),
        clip=group.clip * s,
        optimizer=settings,
    )


def _moved_groups(
    run: Run, scales: Mapping[Place, float], powers: Mapping[str, int]
) -> dict[Place, Group]:
    """The multiples of the run's settings that each scaled factor has."""
    return {
        place: _scaled(group_of(run.train.groups, *place), s, powers) for place, s in scales.items()
    }


def _expressed(run: Run, adapter: Adapter, base: Group, groups: tuple[Group, ...]) -> Run:
    """`run` with its settings multiplied by those of `base`, and these groups."""
    train = run.train
    text_lr, clip = train.text_encoder_lr, train.grad_clip
    return replace(
        run,
        adapter=adapters.describe(adapter),
        optimizer=optimizers.describe(run.optimizer_value().moved(base.optimizer)),
        train=replace(
            train,
            init_scale=train.init_scale * base.init_scale,
            lr=train.lr * base.lr,
            text_encoder_lr=None if text_lr is None else text_lr * base.lr,
            grad_clip=None if clip is None else clip / base.clip,
            groups=groups,
        ),
    )


def _groups(run: Run, values: Mapping[Place, Group], base: Group) -> tuple[Group, ...]:
    """Groups that give every factor its multiples, where the run has those of `base`."""
    by_layer = {layer.name: layer for layer in layers(run)}
    clips = run.train.grad_clip is not None
    members: dict[str, dict[str, list[str]]] = {}  # settings -> layer -> factors
    relative: dict[str, Group] = {}
    for (name, factor), own in values.items():
        layer = by_layer[name]
        starts = factor in layer.scaled and factor not in layer.zero
        settings = {k: v / base.optimizer[k] for k, v in own.optimizer.items()}
        group = Group(
            init_scale=own.init_scale / base.init_scale if starts else 1.0,
            lr=own.lr / base.lr,
            clip=own.clip / base.clip if clips else 1.0,
            optimizer={key: value for key, value in settings.items() if value != 1},
        )
        key = json.dumps(_rounded(asdict(group)), sort_keys=True)
        relative.setdefault(key, group)
        members.setdefault(key, {}).setdefault(name, []).append(factor)
    groups = []
    for key, where in members.items():
        if json.loads(key) == _rounded(asdict(PLAIN)):
            continue
        every = tuple(dict.fromkeys(name for factors in where.values() for name in factors))
        places = [
            (name, f) for name, layer in by_layer.items() for f in layer.factors if f in every
        ]
        if all(factor in where.get(name, ()) for name, factor in places):  # names say which
            groups.append(replace(relative[key], factors=every))
            continue
        together: dict[tuple[str, ...], list[str]] = {}
        for name, factors in where.items():
            alike = len(factors) == len(by_layer[name].factors)
            together.setdefault(("*",) if alike else tuple(factors), []).append(name)
        for patterns, names in together.items():
            others = [layer for name, layer in by_layer.items() if name not in names]
            unique = not any(set(patterns) & {"*", *layer.factors} for layer in others)
            groups.append(
                replace(
                    relative[key],
                    layers=("*",) if unique else tuple(names),
                    factors=patterns,
                )
            )
    return tuple(groups)


def _rounded(group: dict[str, Any]) -> dict[str, Any]:
    """To the digits that tell settings apart, however they were computed; 1 is left out."""
    numbers = {key: float(f"{group[key]:.9g}") for key in ("init_scale", "lr", "clip")}
    optimizer = {key: float(f"{value:.9g}") for key, value in group["optimizer"].items()}
    return numbers | {"optimizer": {key: value for key, value in optimizer.items() if value != 1}}


def _own(rule: Optimizer) -> dict[str, int]:
    """The powers of the optimizer's own settings."""
    return {key: power for key, power in rule.powers.items() if key != "lr"}


def canonical(run: Run) -> Run:
    """The representative of the runs that train the same W': gamma = 1, init_scale = 1.

    All of gamma and of the start's scales is carried by the factors that start at 0; where a term
    has none, by all of its factors alike. The settings of the run are those of its first factor
    with a start, and groups say what differs. A run whose gamma cannot be moved represents itself.
    """
    scales = _canonical_scales(run)
    if scales is None:
        return run
    each = _everywhere(run, scales)
    starting = (
        (layer.name, name)
        for layer in layers(run)
        for term in layer.terms
        for name in term
        if name not in layer.zero
    )
    values = _moved_groups(run, each, run.optimizer_value().powers)
    base = values[next(starting, next(iter(each)))]
    adapter = run.adapter_value().with_gamma(1.0)
    return _expressed(run, adapter, base, _groups(run, values, base))


def _canonical_scales(run: Run) -> Scales | None:
    if obstacle(run):
        return None
    if run.optimizer_value().one_scale:
        return _one_scale(run)
    scales: Scales = {}
    for layer in layers(run):
        assert layer.gamma is not None
        for term in layer.terms:
            starts = [name for name in term if name not in layer.zero]
            start = {name: _start(run.train, layer, name) for name in starts}
            whole = layer.gamma * math.prod(start.values())
            scales |= {(layer.name, name): 1 / start[name] for name in starts}
            carriers = [name for name in term if name in layer.zero] or starts
            share = scale(whole, len(carriers))
            for name in carriers:
                scales[layer.name, name] = scales.get((layer.name, name), 1.0) * share
    return scales


def _one_scale(run: Run) -> Scales | None:
    """The one s for every factor that leaves gamma = 1; None where there is none."""
    needed = {
        scale(layer.gamma, len(term))
        for layer in layers(run)
        if layer.gamma is not None
        for term in layer.terms
    }
    if any(layer.others for layer in layers(run)):
        needed.add(1.0)
    if len(needed) != 1:
        return None
    (s,) = needed
    return {(layer.name, name): s for layer in layers(run) for name in layer.factors}


def _start(train: Train, layer: Layer, factor: str) -> float:
    """What multiplies the start of a factor."""
    if factor not in layer.scaled:
        return 1.0
    return train.init_scale * group_of(train.groups, layer.name, factor).init_scale


@dataclass(frozen=True)
class Equivalence:
    """Whether two runs train the same W', and why not."""

    equal: bool
    bitwise: bool  # in every bit, not only up to rounding
    reason: str  # of a difference; what was shown, where there is none
    scales: Mapping[Place, float] = field(
        default_factory=dict, repr=False
    )  # factors of b, in those of a

    def __bool__(self) -> bool:
        return self.equal


def equivalent(a: Run, b: Run) -> Equivalence:
    """Whether the theorem makes the two runs the same; names are not compared.

    Both are brought to their representatives, and their settings compared factor by factor.
    """
    return _compared(_Form(a), _Form(b))


@dataclass(frozen=True)
class _Setting:
    """A number that decides how a factor trains."""

    place: Place
    key: str
    value: float
    s: float  # the factor's, to the run's representative
    power: int  # of s, by which the setting moves

    @property
    def moved(self) -> float:
        return self.value * self.s**self.power


class _Form:
    """A run as it is compared: what no scaling moves, and the other settings factor by factor."""

    def __init__(self, run: Run) -> None:
        self.run, self.rest = run, _rest(run)

    @functools.cached_property
    def settings(self) -> list[_Setting] | None:
        """None where there is no representative but the run itself."""
        run, scales = self.run, _canonical_scales(self.run)
        if scales is None:
            return None
        found = []
        for layer in layers(run):
            for factor in layer.factors:
                place, values = (layer.name, factor), _settings(run, layer, factor)
                s = scales.get(place, 1.0)
                for key, power in _powers(run, layer, factor).items():
                    found.append(_Setting(place, key, values[key], s, power))
        return found

    @functools.cached_property
    def out_of_range(self) -> str:
        """Which scale or gamma may take numbers of the training out of the range of float32."""
        for layer in layers(self.run):
            if layer.gamma is not None and abs(math.log2(layer.gamma)) > GAMMA_BITS:
                return (
                    f"gamma of {layer.name} is {layer.gamma:.3g} in {self.run.name}, and outside "
                    f"2^-{GAMMA_BITS} to 2^{GAMMA_BITS} numbers may leave the range of float32: "
                    "nothing is claimed"
                )
        for setting in self.settings or ():
            if abs(math.log2(setting.s)) > SCALE_BITS:
                layer_name, factor = setting.place
                return (
                    f"factor {factor} of {layer_name} is {1 / setting.s:.3g} times as large in "
                    f"{self.run.name} as with gamma = 1, and outside 2^-{SCALE_BITS} to "
                    f"2^{SCALE_BITS} numbers may leave the range of float32: nothing is claimed"
                )
        return ""


def out_of_range(run: Run) -> str:
    """Why nothing is claimed of the run and any with other scales; "" where something is."""
    return _Form(run).out_of_range


def _sums(a: Run, b: Run) -> str:
    """What makes the two add up numbers in another order; "" where nothing does."""
    for key in ("devices", "accelerator", "strategy"):
        ours, theirs = getattr(a.trainer, key), getattr(b.trainer, key)
        if ours != theirs:
            return (
                f"the same up to rounding of sums: trainer.{key} is {ours!r} in {a.name} and "
                f"{theirs!r} in {b.name}"
            )
    return ""


def _twins(a: Run, between: Mapping[Place, float]) -> bool:
    """Whether every untrained factor is scaled as the factor that it is a copy of."""
    return all(
        between[layer.name, copy] == between[layer.name, twin]
        for layer in layers(a)
        for copy, twin in layer.adapter.twins.items()
        if (layer.name, copy) in between
    )


def _compared(a: _Form, b: _Form) -> Equivalence:
    for run in (a.run, b.run):
        if run.trainer.callbacks:
            return Equivalence(False, False, f"of {run.name}: {obstacle(run)}")
    for key, ours, theirs in differences(a.rest, b.rest):
        why = f"{key} is {ours!r} in {a.run.name} and {theirs!r} in {b.run.name}"
        return Equivalence(False, False, why)
    if a.settings is None or b.settings is None:
        same = identity(a.run.to_dict()) == identity(b.run.to_dict())
        why = obstacle(a.run) or (
            "its factors need several scales, and its optimizer takes one for all"
        )
        sums = _sums(a.run, b.run)
        shown = (sums or "equal settings") if same else f"settings differ, and {why}"
        return Equivalence(same, same and not sums, shown)
    bitwise = a.run.optimizer_value().exact and b.run.optimizer_value().exact
    for x, y in zip(a.settings, b.settings, strict=True):
        if not math.isclose(x.moved, y.moved, rel_tol=SAME):
            layer, factor = x.place
            return Equivalence(
                False,
                False,
                f"{x.key} of {layer}, factor {factor}, is {x.moved:.6g} in {a.run.name} and "
                f"{y.moved:.6g} in {b.run.name}, once both have gamma = 1 and the same start",
            )
        between = y.s / x.s
        bitwise = bitwise and is_power_of_two(between) and x.value == y.value * between**x.power
    scales = {x.place: x.s / y.s for x, y in zip(a.settings, b.settings, strict=True)}
    beyond = a.out_of_range or b.out_of_range
    if beyond and any(s != 1 for s in scales.values()):
        return Equivalence(False, False, beyond)
    bitwise = bitwise and _twins(a.run, scales)
    sums = _sums(a.run, b.run)
    if sums:
        return Equivalence(True, False, sums, scales)
    shown = "the same bit for bit" if bitwise else "the same up to rounding"
    return Equivalence(True, bitwise, shown, scales)


def _powers(run: Run, layer: Layer, factor: str) -> dict[str, int]:
    """Setting of a factor -> the power of s by which it moves."""
    rule = run.optimizer_value()
    powers = {"lr": rule.powers.get("lr", 0)}
    for key, power in _own(rule).items():
        powers |= dict.fromkeys(_numbers(key, getattr(rule, key)), power)
    if run.train.grad_clip is not None:
        powers["the weight in the clipped norm"] = 1
    if factor in layer.scaled and factor not in layer.zero:
        powers["init_scale"] = 1
    return powers


def _settings(run: Run, layer: Layer, factor: str) -> dict[str, float]:
    """What a factor starts from and is moved by, as numbers."""
    group = group_of(run.train.groups, layer.name, factor)
    rule = run.optimizer_value()
    settings = {
        "lr": run.train.rate(layer.name.partition(".")[0]) * group.lr,
        "init_scale": _start(run.train, layer, factor),
    }
    for key in _own(rule):
        value = getattr(rule.moved({key: group.optimizer.get(key, 1.0)}), key)
        settings |= _numbers(key, value)
    if run.train.grad_clip is not None:
        settings["the weight in the clipped norm"] = group.clip / run.train.grad_clip
    return settings


def _numbers(key: str, value: Any) -> dict[str, float]:
    """A setting under its name, and the two of a pair under names of their own."""
    if isinstance(value, tuple):
        return {f"{key}[{i}]": number for i, number in enumerate(value)}
    return {} if value is None else {key: value}


def alike(a: Run, b: Run) -> bool:
    """Whether two runs differ in nothing but settings that a scaling of factors moves."""
    return _rest(a) == _rest(b)


def _rest(run: Run) -> dict[str, Any]:
    """The run's settings that no scaling of factors moves."""
    rest, rule = dict(identity(run.to_dict())), run.optimizer_value()
    if not obstacle(run):
        rest["adapter"] = adapters.describe(run.adapter_value().with_gamma(1.0))
    moved = {"lr", "text_encoder_lr", "init_scale", "grad_clip", "groups"}
    rest["train"] = {k: v for k, v in rest["train"].items() if k not in moved}
    rest["train"]["grad_clip is set"] = run.train.grad_clip is not None
    rest["optimizer"] = {
        key: value is None if key in rule.powers else value for key, value in run.optimizer.items()
    }
    return rest


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in (*ours, *(key for key in theirs if key not in ours)):
        here, there = ours.get(key), theirs.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from differences(here, there, f"{prefix}{key}.")
        elif here != there:
            yield f"{prefix}{key}", here, there


@dataclass(frozen=True)
class Class:
    """Runs that train the same W', of which the first stands for all."""

    runs: tuple[Run, ...]
    bitwise: bool  # they agree in every bit

    @property
    def representative(self) -> Run:
        return self.runs[0]


def classes(runs: Sequence[Run]) -> list[Class]:
    """The runs in classes of equivalent ones, in the order of their first members."""
    found: list[Class] = []
    forms: list[_Form] = []  # of their representatives
    for form in map(_Form, runs):
        for number, known in enumerate(forms):
            verdict = _compared(known, form)
            if verdict:
                members, bitwise = found[number].runs, found[number].bitwise
                found[number] = Class((*members, form.run), bitwise and verdict.bitwise)
                break
        else:
            found.append(Class((form.run,), True))
            forms.append(form)
    return found
