"""What the theorem on gamma asks of every adapter: that its claims about T are true.

    T = sum_t T_t, each linear in every factor of its term; so with every factor A_i scaled by s_i,

    gamma T(s A)  =  g gamma T(A)              where the product of s_i over each term is g
    dL/dA_i at (g gamma, A)  =  s_i dL/dA_i at (gamma, s A)

The first is checked on the definition, for any s; both are checked on the layer as it trains, with
every option, for powers of two: bit for bit.
"""

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.layer_adapter import BIAS
from lyco_lab.adapters.mount import Mounted, attach
from lyco_lab.adapters.options import SCALAR, Options
from lyco_lab.adapters.shapes import Factors, Terms
from lyco_lab.seeds import generator
from tests.adapters.law import Case, error
from tests.strategies import random_factors, random_weight

CLOSE = 1e-10  # relative, in float64: T-LoRA's terms cancel, the others are exact to some 1e-15
powers = st.integers(min_value=-4, max_value=4).map(lambda k: 2.0**k)
Gauge = dict[str, float]


@st.composite
def gauges(draw: st.DrawFn, terms: Terms) -> tuple[float, Gauge]:
    """g, and a number for each factor, with the product g over every term."""
    number = st.floats(min_value=0.2, max_value=5.0)
    count = sum(map(len, terms))
    return free(terms, draw(number), draw(st.lists(number, min_size=count, max_size=count)))


def free(terms: Terms, g: float, numbers: list[float]) -> tuple[float, Gauge]:
    """The factors scaled by these numbers, but for one of each term, which the others fix."""
    left, scales = iter(numbers), {}
    for term in terms:
        *others, last = (name for name in term if name not in scales)
        scales |= {name: next(left) for name in others}
        scales[last] = g / math.prod(scales[name] for name in term if name != last)
    return g, scales


@st.composite
def exact_gauges(draw: st.DrawFn, terms: Terms) -> tuple[float, Gauge]:
    """The same in powers of two, alike in each term: terms may be computed in common."""
    (degree,) = {len(term) for term in terms}
    return linked(terms, draw(st.lists(powers, min_size=degree, max_size=degree)))


def linked(terms: Terms, numbers: list[float]) -> tuple[float, Gauge]:
    """g and the scales, if the factors of each term are scaled by these numbers in turn."""
    scales: Gauge = {}
    for term in terms:
        scales |= dict(zip(term, numbers, strict=False))
    return math.prod(numbers[: len(terms[0])]), scales


def scaled(factors: Factors, scales: Gauge) -> Factors:
    return {name: scales.get(name, 1.0) * factor for name, factor in factors.items()}


def change(adapter: Adapter, options: Options, weight: Tensor, factors: Factors) -> Tensor:
    """W' - W by the definition; a trained scalar multiplies the scaling factors."""
    rule = {name: factor for name, factor in factors.items() if name != SCALAR}
    if options.use_scalar:
        names = [name for name in adapter.inner.scaling if name in rule]
        rule |= {name: factors[SCALAR] * rule[name] for name in names}
    return adapter.delta(weight, rule)


def check_terms(case: Case, gauge: tuple[float, Gauge]) -> None:
    """T is the sum of products that the terms say it is, on the rule that has them."""
    layer, _ = case.layer()
    shape, rule, options = tuple(layer.weight.shape), case.adapter.inner, case.options
    terms, (g, scales) = options.terms(rule, shape), gauge
    weight = random_weight(shape, case.seed)
    factors = random_factors(rule, weight, case.seed)
    if options.use_scalar:
        factors[SCALAR] = torch.tensor(0.7, dtype=torch.float64)
    assert {name for term in terms for name in term} == factors.keys()
    assert {len(term) for term in rule.terms(shape)} == {rule.degree(shape)}

    def at(factors: Factors) -> Tensor:
        return change(rule, options, weight, factors)

    whole = at(factors)
    assert error(at(scaled(factors, scales)), g * whole) <= CLOSE, "all factors"
    for name in factors:
        without, doubled = (at(scaled(factors, {name: c})) for c in (0.0, 2.0))
        assert error(doubled + without, 2 * whole) <= CLOSE, f"linear in {name}"
        alone = all(name in term for term in terms)
        assert bool(without.any()) is not alone, f"the terms of {name}"


def check_equal_runs(case: Case, gammas: tuple[float, float], scales: Gauge) -> None:
    """A layer with g gamma and A is one with gamma and s A, bit for bit, and so are gradients."""
    g_gamma, gamma = gammas
    one = _mounted(case, case.adapter.with_gamma(g_gamma), {})
    other = _mounted(case, case.adapter.with_gamma(gamma), scales)
    (model, mounted, x), (twin_model, twin, _) = one, other
    assert torch.equal(mounted.delta("0"), twin.delta("0"))
    y, twin_y = model(x), twin_model(x)
    assert torch.equal(y, twin_y)
    if not y.requires_grad:  # at strength 0, of a layer whose input is numbers of rows
        return
    direction = torch.randn(y.shape, dtype=y.dtype, generator=generator(case.seed, "direction"))
    trained = [name for name, factor in mounted.factors("0").items() if factor.requires_grad]

    def gradients(y: Tensor, mounted: Mounted) -> tuple[Tensor | None, ...]:
        wanted = [mounted.factors("0")[name] for name in trained]
        return torch.autograd.grad((y * direction).sum(), wanted, allow_unused=True)

    for name, grad, twin_grad in zip(
        trained, gradients(y, mounted), gradients(twin_y, twin), strict=True
    ):
        if grad is None or twin_grad is None:
            assert grad is twin_grad, name
        else:
            assert torch.equal(grad, scales.get(name, 1.0) * twin_grad), name


def _mounted(case: Case, adapter: Adapter, scales: Gauge) -> tuple[nn.Sequential, Mounted, Tensor]:
    model, mounted, x = dataclasses.replace(case, adapter=adapter).mounted()
    with torch.no_grad():
        for name, factor in mounted.factors("0").items():
            factor *= scales.get(name, 1.0)
    return model, mounted, x


def check_zero(case: Case) -> None:
    """What is 0 at the start is what is said to be, so that it may be scaled by anything."""
    layer, _ = case.layer()
    mounted = attach(nn.Sequential(layer), case.adapter, ["0"], seed=0, options=case.options)
    start = {name: factor for name, factor in mounted.factors("0").items() if name != BIAS}
    zero = {name for name, factor in start.items() if not factor.any()}
    assert zero == start.keys() & set(case.options.zero(case.adapter))


def check_with_gamma(adapter: Adapter, shape: tuple[int, ...], gamma: float) -> None:
    """The gamma asked for, in front of the same T."""
    changed = adapter.with_gamma(gamma)
    assert changed.gamma(shape) == gamma
    assert changed.terms(shape) == adapter.terms(shape)
    assert changed.factor_shapes(shape) == adapter.factor_shapes(shape)
    nearly = adapter.with_gamma(0.3).gamma(shape)
    assert nearly is not None and abs(nearly - 0.3) <= 2 * math.ulp(0.3)
