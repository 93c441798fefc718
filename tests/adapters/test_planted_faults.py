"""The law of the contract sees what it should: faults planted in the library break it, each alone.

The first four are faults that other libraries have, or had.
"""

import dataclasses

import pytest
import torch

from lyco_lab.adapters import adapted_layer, layer_adapter, lowrank, plan
from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.dora import DoRA
from lyco_lab.adapters.dylora import DyLoRA
from lyco_lab.adapters.geometry import Convolution, Linear
from lyco_lab.adapters.glora import GLoRA
from lyco_lab.adapters.ia3 import IA3, Rows
from lyco_lab.adapters.kernel import FORM_TOKENS, SIDE_TOKENS
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA, Pair
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.norm import Norm
from lyco_lab.adapters.oft import OFT
from lyco_lab.adapters.options import SCALAR, Options
from lyco_lab.adapters.tlora import TLoRA
from tests.adapters.gauge import (
    check_equal_runs,
    check_terms,
    check_with_gamma,
    check_zero,
    free,
    linked,
)
from tests.adapters.law import Case, check_gradients, check_values


def case(adapter, geometry="linear", strength=1.0, **options):
    return Case(adapter, geometry, Options(**options), strength, torch.float64, seed=7)


LORA = LoRA(rank=3, alpha=2.0)
DORA = DoRA(of=LORA)


def gamma_twice(monkeypatch):
    kernel = LoRA.kernel

    def squared(self, shape):
        made = kernel(self, shape)
        return dataclasses.replace(made, gamma=made.gamma**2)

    monkeypatch.setattr(LoRA, "kernel", squared)


def transposed_factor(monkeypatch):
    read = Adapter.from_file

    def transposed(self, shape, tensors):
        factors = read(self, shape, tensors)
        return {name: f.reshape(f.shape[::-1]).t().contiguous() for name, f in factors.items()}

    monkeypatch.setattr(Adapter, "from_file", transposed)


def dropped_bias(monkeypatch):
    monkeypatch.setattr(adapted_layer.Adapted, "bias_with", lambda self, mounts: None)


def detached_norm(monkeypatch):
    """What DoRA's own option asks for, in the kernel of one that does not ask."""
    kernel = DoRA.kernel
    monkeypatch.setattr(
        DoRA, "kernel", lambda self, shape: kernel(dataclasses.replace(self, detached=True), shape)
    )


def strength_left_out(monkeypatch):
    monkeypatch.setattr(layer_adapter, "_scale", lambda factors, names, by: None)


def rotated_the_other_way(monkeypatch):
    delta = OFT.delta
    monkeypatch.setattr(
        OFT,
        "delta",
        lambda self, weight, factors: delta(self, weight, {k: -v for k, v in factors.items()}),
    )


def gradient_without_gamma(monkeypatch):
    grads = Pair.token_grads

    def unscaled(self, op, gy, x, factors, gx):
        return grads(dataclasses.replace(self, gamma=1.0), op, gy, x, factors, gx)

    monkeypatch.setattr(Pair, "token_grads", unscaled)


def padding_forgotten(monkeypatch):
    monkeypatch.setattr(Convolution, "enter", lambda self, x: x)


def rounded_weights(monkeypatch):
    def form(self, weight, factors, out=None):
        return lowrank.LowRank.form(self, weight.bfloat16().to(weight.dtype), factors, out)

    monkeypatch.setattr(Pair, "form", form)


def bias_twice(monkeypatch):
    offset = layer_adapter.Mount.offset
    monkeypatch.setattr(
        layer_adapter.Mount,
        "offset",
        lambda self: None if offset(self) is None else 2 * offset(self),
    )


def side_forgotten(monkeypatch):
    monkeypatch.setattr(Linear, "side_", lambda self, gx, gh, a_RQ: gx)


FAULTS = [
    (gamma_twice, case(LORA), "values"),
    (transposed_factor, case(LORA), "values"),
    (dropped_bias, case(Native()), "values"),
    (detached_norm, case(DORA), "gradients"),
    (strength_left_out, case(LoKr(rank=1, factor=2), strength=0.5), "values"),
    (rotated_the_other_way, case(OFT(4)), "values"),
    (gradient_without_gamma, case(LORA), "gradients"),
    (padding_forgotten, case(LORA, "circular"), "values"),
    (rounded_weights, case(LORA), "values"),
    (bias_twice, case(Native(bias=True)), "values"),
    (side_forgotten, case(LORA), "gradients"),
]


@pytest.mark.parametrize(
    ("plant", "example", "kind"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS]
)
def test_a_planted_fault_breaks_the_law(plant, example, kind, monkeypatch, tmp_path):
    def check():
        for forced in (SIDE_TOKENS, FORM_TOKENS):
            with plan.forced(forced):
                if kind == "values":
                    check_values(example, tmp_path)
                else:
                    check_gradients(example)

    check()
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


# Claims that the theorem on gamma rests on: what is claimed, on which case, what check sees it.


def claim(cls, name, value):
    def plant(monkeypatch):
        monkeypatch.setattr(cls, name, value)

    return plant


def terms(cls, *said):
    return claim(cls, "terms", lambda self, shape: said)


def gamma_left_to_convolutions(monkeypatch):
    """The alpha of convolutions stays as it was."""
    with_gamma = LoRA.with_gamma

    def forgetful(self, gamma):
        return dataclasses.replace(with_gamma(self, gamma), conv_alpha=self.conv_alpha)

    monkeypatch.setattr(LoRA, "with_gamma", forgetful)


def gamma_as_if_not_stabilised(monkeypatch):
    monkeypatch.setattr(
        LoRA,
        "with_gamma",
        lambda self, gamma: dataclasses.replace(self, alpha=gamma * self.rank, conv_alpha=None),
    )


def rows_without_gamma(monkeypatch):
    backward = Rows.backward
    monkeypatch.setattr(
        Rows,
        "backward",
        lambda self, *given: backward(dataclasses.replace(self, gamma=1.0), *given),
    )


def gamma_in_the_magnitude(monkeypatch):
    monkeypatch.setattr(DoRA, "terms", lambda self, shape: (("b_PR", "a_RQ", "magnitude"),))


def scalar_unclaimed(monkeypatch):
    monkeypatch.setattr(Options, "terms", lambda self, adapter, shape: adapter.terms(shape))


CONV_LORA = LoRA(rank=2, alpha=3.0, conv_rank=3, conv_alpha=5.0)
STABILISED = LoRA(rank=3, alpha=2.0, rank_stabilised=True)
FALSE_CLAIMS = [
    (terms(LoRA, ("b_PR",)), case(LORA), "terms"),
    (terms(LoRA, ("b_PR",), ("a_RQ",)), case(LORA), "terms"),
    (terms(LoRA, ("b_PR", "a_RQ", "m_RRk")), case(LORA), "terms"),
    (terms(GLoRA, ("a1_QR", "a2_RQ", "b1_PR", "b2_RQ")), case(GLoRA(2)), "terms"),
    (terms(GLoRA, ("a1_QR", "b2_RQ"), ("b1_PR", "a2_RQ")), case(GLoRA(2)), "terms"),
    (terms(TLoRA, ("p_PR", "l_1R", "q_RQ")), case(TLoRA(2)), "terms"),
    (terms(OFT, ("blocks",)), case(OFT(4)), "terms"),
    (terms(IA3, ("w_Q",)), case(IA3()), "terms"),
    (scalar_unclaimed, case(LORA, use_scalar=True), "terms"),
    (claim(LoRA, "degree", lambda self, shape: 3), case(LORA), "terms"),
    (gradient_without_gamma, case(LORA), "runs"),
    (rows_without_gamma, case(IA3()), "runs"),
    (gamma_twice, case(LORA), "runs"),
    (gamma_in_the_magnitude, case(DORA), "runs"),
    (claim(LoRA, "zero", ("a_RQ",)), case(LORA), "zero"),
    (claim(LoRA, "zero", ()), case(LORA), "zero"),
    (claim(LoKr, "zero", ("a_RT",)), case(LoKr(factor=2)), "zero"),
    (claim(Norm, "zero", ()), case(Norm(), "layer norm"), "zero"),
    (claim(Options, "zero", lambda self, a: a.zero), case(DyLoRA(2), use_scalar=True), "zero"),
    (claim(Options, "zero", lambda self, a: (SCALAR,)), case(DyLoRA(2)), "zero"),
    (gamma_left_to_convolutions, case(CONV_LORA, "3x3"), "gamma"),
    (gamma_as_if_not_stabilised, case(STABILISED), "gamma"),
    (claim(LoRA, "gamma", lambda self, shape: 1.0), case(LORA), "gamma"),
]


@pytest.mark.parametrize(
    ("plant", "example", "kind"),
    FALSE_CLAIMS,
    ids=[f"{kind} {type(one.adapter).__name__}" for _, one, kind in FALSE_CLAIMS],
)
def test_a_false_claim_is_found(plant, example, kind, monkeypatch):
    """The scales are those of the claim, which is all that the checks know."""
    shape = tuple(example.layer()[0].weight.shape)

    def check():
        said = example.options.terms(example.adapter, shape)
        if kind == "terms" and said:
            check_terms(example, free(said, 3.0, [0.7, 1.9, 0.4, 1.1, 0.6]))
        elif kind == "runs":
            g, scales = linked(said, [4.0, 0.125, 2.0, 2.0, 0.5])
            with plan.forced(SIDE_TOKENS):
                check_equal_runs(example, (g * 0.5, 0.5), scales)
        elif kind == "zero":
            check_zero(example)
        elif kind == "gamma":
            check_with_gamma(example.adapter, shape, 0.25)

    check()
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        check()
