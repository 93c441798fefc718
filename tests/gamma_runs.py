"""A small network with adapters in it, trained with gamma and without.

A run starts its factors at A_i / s_i and has gamma = prod s_i in front of T. `moved` gives each
factor the settings that belong to its s_i, so that the run applies the updates that it applies at
s_i = 1, where the settings are as they were drawn: tame ones, whatever gamma is. Losses are smooth
and steps small, so that the training itself does not amplify what rounding does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lyco_lab.adapters import ADAPTERS
from lyco_lab.adapters.base import Additive
from lyco_lab.optimizers.base import Group, Optimizer
from tests.optimizers.law import default_dtype
from tests.strategies import adapters_on, random_factors, random_weight, seeds, sides

STEPS = 50
LBFGS_LR = 0.3

ADDITIVE = [c for c in ADAPTERS.values() if issubclass(c, Additive) and c.takes == "matrix"]
LOSSES = ["squares", "logistic", "angle"]


# What is trained: W + gamma T, read out by a network.


@dataclass(frozen=True)
class Product:
    """T: a product, entry by entry, of products of matrices; of degrees no adapter has as well."""

    shape: tuple[int, int]
    rank: int
    chains: tuple[int, ...]  # how many matrices each has

    def sizes(self) -> dict[str, tuple[int, int]]:
        P, Q, R = *self.shape, self.rank
        found = {}
        for number, length in enumerate(self.chains):
            ends = [P, *[R] * (length - 1), Q]
            for place in range(length):
                found[f"{number}.{place}"] = (ends[place], ends[place + 1])
        return found

    def transform(self, factors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        total = torch.ones(shape, dtype=torch.float64)
        for number, length in enumerate(self.chains):
            chain = [factors[f"{number}.{place}"] for place in range(length)]
            total = total * (chain[0] if length == 1 else torch.linalg.multi_dot(chain))
        return total


@dataclass
class Layer:
    """One T, where its factors start, and the terms that it is a sum of."""

    transform: Callable[[dict[str, Tensor], tuple[int, ...]], Tensor]
    shape: tuple[int, ...]
    weight: Tensor
    start: dict[str, Tensor]
    terms: tuple[tuple[str, ...], ...]


@dataclass
class Problem:
    layers: list[Layer]
    loss: str
    seed: int
    clip: float | None = None


@st.composite
def products(draw: st.DrawFn) -> Layer:
    degree = draw(st.integers(1, 6))
    cuts = draw(st.sets(st.integers(1, degree - 1), max_size=2)) if degree > 1 else set()
    edges = [0, *sorted(cuts), degree]
    chains = tuple(b - a for a, b in zip(edges, edges[1:], strict=False))
    shape, seed = (draw(sides), draw(sides)), draw(seeds)
    t = Product(shape, draw(st.integers(1, 4)), chains)
    rng = torch.Generator().manual_seed(seed)
    start = {
        name: torch.randn(size, generator=rng, dtype=torch.float64) / max(size) ** 0.25
        for name, size in t.sizes().items()
    }
    return Layer(t.transform, shape, random_weight(shape, seed), start, (tuple(start),))


@st.composite
def adapted(draw: st.DrawFn) -> Layer:
    shape = (draw(sides), draw(sides), *draw(st.sampled_from([(), (), (3,), (2, 2)])))
    adapter = draw(adapters_on(draw(st.sampled_from(ADDITIVE)), shape))
    weight, seed = random_weight(shape, draw(seeds)), draw(seeds)
    if draw(st.booleans()):
        start = adapter.init(weight, torch.Generator().manual_seed(seed))
    else:
        start = {k: 0.5 * v for k, v in random_factors(adapter, weight, seed).items()}
    return Layer(adapter.transform, shape, weight, start, adapter.terms(shape))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    layers = draw(st.lists(products() | adapted(), min_size=1, max_size=2))
    clip = draw(st.sampled_from([None, 0.05]))
    return Problem(layers, draw(st.sampled_from(LOSSES)), draw(seeds), clip)


def loss_of(problem: Problem, updates: Sequence[Tensor], batch: int) -> Tensor:
    """Of the network's answers to one half of the data."""
    rng = torch.Generator().manual_seed(problem.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)[batch::2]

    total = torch.zeros((), dtype=torch.float64)
    for layer, update in zip(problem.layers, updates, strict=True):
        w_PQ = (layer.weight + update).flatten(1)
        P, Q = w_PQ.shape
        h_NP = torch.tanh(normal(12, Q) @ w_PQ.T / Q**0.5 + total)  # the layers see each other
        z_NP, y_NP = h_NP + 0.3 * h_NP.roll(1, 1), normal(12, P)
        if problem.loss == "squares":
            total = total + (z_NP - y_NP).square().mean()
        elif problem.loss == "logistic":
            total = total + nn.functional.softplus(-y_NP * z_NP).mean()
        else:
            total = total - torch.cosine_similarity(z_NP, y_NP, dim=1).mean()
    return 4 * total


# How it is trained.

Scales = list[dict[str, float]]  # of each layer's factors


@dataclass
class Run:
    """A start at A / s, gamma = prod s, and what moves each factor."""

    problem: Problem
    scales: Scales  # s
    gammas: list[float]
    settings: Callable[[float], tuple[Optimizer, float]]  # a factor's s -> its rule and lr
    scales_start: bool = True
    scales_clip: bool = True

    def go(self) -> list[Tensor]:
        """The layers' updates after each step."""
        factors: list[dict[str, nn.Parameter]] = []
        groups = []
        for number, (layer, scales) in enumerate(
            zip(self.problem.layers, self.scales, strict=True)
        ):
            factors.append({})
            for name, value in layer.start.items():
                start = value / scales[name] if self.scales_start else value
                factor = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
                factors[-1][name] = factor
                rule, lr = self.settings(scales[name])
                groups.append(Group(f"{number}.{name}", [factor], lr, rule))
        with default_dtype(torch.float64):
            optimizer = self.build(groups)
            return [self.step(step, optimizer, groups, factors) for step in range(STEPS)]

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        return groups[0].rule.build(groups)

    def updates(self, factors: list[dict[str, nn.Parameter]]) -> list[Tensor]:
        return [
            gamma * layer.transform(dict(own), layer.shape)
            for layer, gamma, own in zip(self.problem.layers, self.gammas, factors, strict=True)
        ]

    def step(
        self, step: int, optimizer: torch.optim.Optimizer, groups: list[Group], factors: Any
    ) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(self.problem, self.updates(factors), self.batch(step))
            loss = loss + self.penalty(factors)
            loss.backward()
            self.clip(factors)
            return loss

        self.set_rates(step, optimizer, groups, closure)
        optimizer.step(closure)
        with torch.no_grad():
            return torch.cat([update.flatten() for update in self.updates(factors)])

    def set_rates(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        groups: list[Group],
        closure: Callable[[], Tensor],
    ) -> None:
        for own, group in zip(optimizer.param_groups, groups, strict=True):
            own["lr"] = group.lr * min(1.0, (step + 1) / 8) * group.rule.rate(step)

    def batch(self, step: int) -> int:
        return step % 2

    def penalty(self, factors: Any) -> Tensor | float:
        return 0.0

    def clip(self, factors: Any) -> None:
        """By the norm of the gradients, each of which is in units of its factor's scale."""
        if self.problem.clip is None:
            return
        pairs = [
            (factor.grad, scales[name] if self.scales_clip else 1.0)
            for own, scales in zip(factors, self.scales, strict=True)
            for name, factor in own.items()
            if factor.grad is not None
        ]
        norm = math.sqrt(sum(float((g / s).square().sum()) for g, s in pairs))
        for gradient, _ in pairs:
            gradient.mul_(min(1.0, self.problem.clip / norm))


def ones(problem: Problem) -> Scales:
    return [dict.fromkeys(layer.start, 1.0) for layer in problem.layers]


def gammas_of(problem: Problem, scales: Scales) -> list[float]:
    return [
        math.prod(own[name] for name in layer.terms[0])
        for layer, own in zip(problem.layers, scales, strict=True)
    ]


@st.composite
def splits(draw: st.DrawFn, problem: Problem, one: bool, twos: bool) -> Scales:
    """The s of every factor, each layer's gamma within 1e-4..1e4. `twos`: powers of two."""

    def exponent(low: float, high: float) -> float:
        if twos:
            return draw(st.integers(math.ceil(low), math.floor(high)))
        return draw(st.floats(low, high))

    base, most = (2.0, 13.0) if twos else (10.0, 4.0)
    longest = max(len(term) for layer in problem.layers for term in layer.terms)
    if one:
        s = base ** exponent(-most / longest, most / longest)
        return [dict.fromkeys(layer.start, s) for layer in problem.layers]
    found = []
    for layer in problem.layers:
        degree = len(layer.terms[0])
        mean = exponent(-most / degree, most / degree)
        exponents = dict.fromkeys(layer.start, mean)
        if len(layer.terms) == 1 and degree > 1:
            given, taken = draw(st.permutations(layer.terms[0]))[:2]
            shift = exponent(-most / 4, most / 4)
            exponents[given] += shift
            exponents[taken] -= shift
        found.append({name: base**power for name, power in exponents.items()})
    return found


def moved(rule: Optimizer, lr: float) -> Callable[[float], tuple[Optimizer, float]]:
    """Settings that are as the claim has them, for a start at A / s."""

    def settings(s: float) -> tuple[Optimizer, float]:
        return rule.scaled(1 / s), lr * s ** -rule.powers.get("lr", 0)

    return settings


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    here, there = torch.stack(one), torch.stack(other)
    assert here.isfinite().all()
    return ((here - there).norm(dim=1).max() / here.norm(dim=1).max()).item()


def off(one: list[Tensor], other: list[Tensor]) -> float:
    """The distance of two runs, in units of how far the first has trained."""
    here, there = torch.stack(one), torch.stack(other)
    return ((here - there).norm(dim=1).max() / (here - here[0]).norm(dim=1).max()).item()


# What lyco_lab does not offer for training, its factors' gradients being dense and evaluated once
# a step, but the theorem speaks of.


@dataclass(frozen=True)
class SparseAdam(Optimizer):
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 0.02

    powers: ClassVar = {"lr": 1, "eps": -1}

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(groups)


class SparseRun(Run):
    """Each step knows the gradients of every other entry alone."""

    def clip(self, factors: Any) -> None:
        super().clip(factors)
        for own in factors:
            for factor in own.values():
                kept = torch.arange(factor.numel()).view(factor.shape) % 2 == 0
                factor.grad = (factor.grad * kept).to_sparse()


@dataclass(frozen=True)
class LBFGS(Optimizer):
    """Its memory holds steps and differences of gradients, whose inner products keep their size.

    So the direction has the size of the factors by itself and lr stays. But while the memory is
    empty, as at the first step, steps are along the gradient and lr moves by s**2; the first is cut
    by min(1, 1 / |g|_1), which is undone here. Its tolerances, of several powers at once, are 0.
    """

    history_size: int = 5

    one_scale: ClassVar = "one inner product runs over all factors"

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        factors = [factor for group in groups for factor in group["params"]]
        still = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
        return torch.optim.LBFGS(factors, max_iter=1, history_size=self.history_size, **still)


class LBFGSRun(Run):
    def set_rates(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        groups: list[Group],
        closure: Callable[[], Tensor],
    ) -> None:
        (group,) = optimizer.param_groups
        closure()
        gradient = torch.cat([factor.grad.flatten() for factor in group["params"]])
        s = next(iter(self.scales[0].values()))
        memory = optimizer.state[group["params"][0]]
        group["lr"] = LBFGS_LR
        if step == 0:
            group["lr"] *= max(1.0, float(gradient.abs().sum())) * s**-self.empty_power
        elif not memory["old_dirs"]:
            curved = (memory["d"] * memory["t"]).dot(gradient - memory["prev_flat_grad"]) > 1e-10
            group["lr"] *= 1.0 if curved else s**-self.empty_power

    empty_power = 2

    def clip(self, factors: Any) -> None:
        """Differences of clipped gradients say nothing of a curvature."""

    def batch(self, step: int) -> int:
        return 0  # and those of different batches neither

    def penalty(self, factors: Any) -> Tensor:
        """Makes the loss convex enough: along flat directions the rule divides by rounding."""
        pairs = zip(factors, self.scales, strict=True)
        return sum((scales[k] * f).square().sum() for own, scales in pairs for k, f in own.items())
