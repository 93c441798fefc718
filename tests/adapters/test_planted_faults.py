"""The law of the contract sees what it should: faults planted in the library break it, each alone.

The first four are faults that other libraries have, or had.
"""

import dataclasses

import pytest
import torch

from lyco_lab.adapters import layers, lowrank, plan
from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.dora import DoRA
from lyco_lab.adapters.geometry import Convolution, Linear
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA, Pair
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.oft import OFT
from lyco_lab.adapters.options import Options
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
    monkeypatch.setattr(layers.Adapted, "bias_with", lambda self, mounts: None)


def detached_norm(monkeypatch):
    """What DoRA's own option asks for, in the kernel of one that does not ask."""
    kernel = DoRA.kernel
    monkeypatch.setattr(
        DoRA, "kernel", lambda self, shape: kernel(dataclasses.replace(self, detached=True), shape)
    )


def strength_left_out(monkeypatch):
    monkeypatch.setattr(layers, "_scale", lambda factors, names, by: None)


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
    offset = layers.Mount.offset
    monkeypatch.setattr(
        layers.Mount, "offset", lambda self: None if offset(self) is None else 2 * offset(self)
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
        for forced in (plan.SIDE_TOKENS, plan.FORM_TOKENS):
            with plan.forced(forced):
                if kind == "values":
                    check_values(example, tmp_path)
                else:
                    check_gradients(example)

    check()
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check()
