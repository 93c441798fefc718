"""An accelerator that computes nothing, and on which every wait of the processor is an error.

torch's fake tensors have a shape, a type and a device, and no numbers. On a device made in Python
they show what a GPU would: tensors of two devices that meet raise torch's error or `Apart`, and
what needs a number of the device raises `Waits`: `.item()`, `float(t)`, `if t:`, `.tolist()`,
`.cpu()`, a copy into a tensor of the processor, an operation whose result has as many rows as
numbers decide.

The device is registered once in a process, for good: these tests run in one of their own.
"""

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop

from lyco_lab import waits

DEVICE = "elsewhere"
aten = torch.ops.aten
READING = {  # overloads that give a number, or a shape that depends on numbers
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero,
    aten.masked_select, aten.unique_consecutive, aten._unique2, aten.unique_dim,
    aten.repeat_interleave, aten.bincount,
}  # fmt: skip


# Where an index or a value of the processor goes to the device by itself.
MIXING = {aten._to_copy, aten.copy_, aten._foreach_copy_, aten.index, aten.index_put_}


class Apart(RuntimeError):
    """Tensors of the device and of the processor met; fake convolutions would not mind."""


class Waits(RuntimeError):
    """The processor would have waited for the device, outside of `lyco_lab.waits`."""


def is_behind(value: object) -> bool:
    """A tensor of the processor that is no single number, which may go along with any."""
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim() > 0


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device, where a checkpointed block is computed again."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def register() -> None:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, Backend())


def is_there(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == DEVICE


def _names(device: object) -> bool:
    return isinstance(device, torch.device) and device.type == DEVICE


def is_fake(value: object) -> bool:
    return isinstance(value, FakeTensor)


class Watching(TorchDispatchMode):
    """Raises `Waits` for operations that bring numbers from the device to the processor.

    What the processor computes for itself, it computes. An error inside a backward pass would end
    Python, as this device's guard cannot be unwound; so it is noted, and raised at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.late: list[str] = []

    def refuse(self, what: str) -> None:
        if torch._C._current_graph_task_id() == -1:
            raise Waits(what)
        print(what, file=sys.stderr)  # should this be an operation that fails next
        self.late.append(what)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = any(map(is_there, tree_leaves((args, kwargs))))
        masked = operation.overloadpacket in (aten.index, aten.index_put_) and any(
            is_there(leaf) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if masked and operation.overloadpacket == aten.index_put_:
            masked = args[2].numel() != 1  # one number: on a GPU, torch's masked_fill_
        if masked or (given and operation.overloadpacket in READING):
            self.refuse(f"{operation} waits for the device")
            if operation.overloadpacket == aten._local_scalar_dense:
                return 1.0 if args[0].is_floating_point() else 1
        there = _names(kwargs.get("device"))
        if not there and not any(map(is_fake, tree_leaves((args, kwargs)))):
            with unset_fake_temporarily():  # of the processor alone: numbers as ever
                return operation(*args, **kwargs)
        if operation.overloadpacket == aten._to_copy and there:
            # Numbers of the processor may go there, as they always do.
            kind = kwargs.get("dtype") or args[0].dtype
            return torch.empty_like(args[0], dtype=kind, device=DEVICE)
        if given and operation.overloadpacket not in MIXING:
            behind = [leaf for leaf in tree_leaves((args, kwargs)) if is_behind(leaf)]
            if behind:
                raise Apart(f"{operation} meets a tensor of {tuple(behind[0].shape)} left behind")
        found = operation(*args, **kwargs)
        moved = operation.overloadpacket in (aten._to_copy, aten.copy_, aten._foreach_copy_)
        if given and moved:
            from_there = any(map(is_there, tree_leaves((args[1:] or args, kwargs))))
            into = tree_leaves(args[0] if operation.overloadpacket != aten._to_copy else found)
            if from_there and not all(map(is_there, into)):
                self.refuse(f"{operation} copies numbers of the device to the processor")
        return found


@contextmanager
def accelerator(monkeypatch) -> Iterator[Counter]:
    """Inside, tensors have no numbers; yields how often each of `waits.REASONS` was one."""
    register()
    found: Counter = Counter()

    def host(tensor: torch.Tensor, why: str) -> torch.Tensor:
        assert why in waits.REASONS
        found[why] += is_there(tensor)
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, dtype=tensor.dtype)

    def elsewhere_too(make: Any) -> Any:
        """`make` would fill the tensor on the device itself, which has no memory."""

        @functools.wraps(make)
        def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            if device is None or torch.device(device).type != DEVICE or is_there(data):
                return make(data, *args, device=device, **kwargs)
            return make(data, *args, **kwargs).to(DEVICE)

        return made

    monkeypatch.setattr(waits, "host", host)
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, elsewhere_too(getattr(torch, name)))
    watching, one_thread = Watching(), torch.autograd.set_multithreading_enabled(False)
    # Checkpointed blocks end early by an error, too.
    whole = set_checkpoint_early_stop(False)
    with one_thread, whole, FakeTensorMode(allow_non_fake_inputs=True), watching:
        yield found
    if watching.late:
        raise Waits(f"in the backward pass, {watching.late[0]}")


def there(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The module with each parameter and buffer made anew on the device: none can be moved."""
    for part in module.modules():
        for name, old in list(part._parameters.items()):
            if old is not None:
                kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
                new = torch.empty(old.shape, device=DEVICE, dtype=kind)
                part._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        for name, old in list(part._buffers.items()):
            if old is not None:
                part._buffers[name] = torch.empty(old.shape, device=DEVICE, dtype=old.dtype)
    return module
