"""What an adapter's kernel owes: every plan is the layer with W', in values and gradients.

Float64 throughout, on layers whose samples, strides and sides tell every axis from every other.
"""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lyco_lab.adapters import forward, geometry, plan
from lyco_lab.adapters.kernel import FORM_DENSE, FORM_TOKENS, SIDE_TOKENS
from lyco_lab.adapters.mount import attach
from tests.strategies import move

PLANS = [SIDE_TOKENS, FORM_TOKENS, FORM_DENSE]
LAYERS = {
    "narrowing": (lambda: nn.Linear(24, 12), (2, 3, 24)),
    "widening": (lambda: nn.Linear(8, 24, bias=False), (5, 8)),
    "1x1": (lambda: nn.Conv2d(12, 8, 1, stride=2), (2, 12, 3, 5)),
    "1d": (lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1), (3, 8, 7)),
    "2d": (lambda: nn.Conv2d(12, 8, (3, 2), dilation=(1, 2), padding=(2, 1)), (2, 12, 4, 5)),
    "3d": (lambda: nn.Conv3d(8, 16, (1, 2, 3), padding="same"), (2, 8, 2, 3, 4)),
    "channels last": (
        lambda: nn.Conv2d(8, 12, 3, padding=1).to(memory_format=torch.channels_last),
        (3, 8, 4, 5),
    ),
}
GROUPED = {"grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 4, 5))}


def example(layer, adapter, seed):
    """A mounted layer away from its start, and an input."""
    make, shape = (LAYERS | GROUPED)[layer]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, x = nn.Sequential(make().double()), torch.randn(shape, dtype=torch.float64)
    if layer == "channels last":
        x = x.to(memory_format=torch.channels_last)
    mounted = attach(model, adapter, ["0"], seed=0)
    move(mounted, seed)
    return model, mounted, x.requires_grad_()


def value_and_gradients(compute, x, mounted, seed):
    y = compute(x)
    rng = torch.Generator().manual_seed(seed)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=rng)
    return y, *torch.autograd.grad((y * direction).sum(), [x, *mounted.parameters()])


def check_plans(layer, adapter, seed):
    model, mounted, x = example(layer, adapter, seed)
    with plan.forced("reference"):
        expected = value_and_gradients(model, x, mounted, seed)
    for forced in PLANS:
        with plan.forced(forced):
            got = value_and_gradients(model, x, mounted, seed)
        for one, other in zip(got, expected, strict=True):
            assert close(one, other), forced


def check_merged_in_place(layer, adapter, seed):
    model, mounted, x = example(layer, adapter, seed)
    expected = adapter.adapted(mounted.base_weight("0"), mounted.factors("0")).detach()
    mounted.merge(keep_base=False)
    assert close(model[0].weight, expected)


def check_change(layer, adapter, seed):
    """`change`, in which half precision computes, is (W' - W) x; here in float64."""
    model, mounted, x = example(layer, adapter, seed)
    frozen = forward.Frozen(model[0], torch.float64)

    def change(x):
        factors = model[0].mounts[0].current()
        return frozen.op.leave(adapter.change(frozen, frozen.op.enter(x), factors), x)

    with plan.forced("reference"):
        expected = value_and_gradients(
            lambda x: model(x) - base_output(model[0], x), x, mounted, seed
        )
    got = value_and_gradients(change, x, mounted, seed)
    for one, other in zip(got, expected, strict=True):
        assert close(one, other)


def base_output(layer, x):
    op = geometry.of(layer)
    return op.leave(op.product(op.enter(x), layer.frozen_weight, layer.frozen_bias), x)


def close(one, other):
    """To what sums of some hundred terms lose in float64."""
    return one.shape == other.shape and (one - other).norm() <= 1e-11 * other.norm()


def check_derivatives(layer, adapter, forced, twice=False):
    """Against finite differences."""
    model, mounted, x = example(layer, adapter, 0)
    mount, frozen = model[0].mounts[0], model[0]
    names = list(mount.current())

    def compute(x, *values):
        factors = dict(zip(names, values, strict=True))
        op, weight = geometry.of(frozen), frozen.frozen_weight
        with plan.forced(forced):
            return plan.product(op, adapter, x, weight, frozen.frozen_bias, factors)

    check = torch.autograd.gradgradcheck if twice else torch.autograd.gradcheck
    assert check(compute, (x, *mounted.parameters()))


class Largest(TorchDispatchMode):
    """The most entries that a tensor made within the block has, views of `known` aside."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in self.known
            ):
                self.entries = max(self.entries, tensor.numel())
        return result
