"""Blocks whose inner values are computed a second time in the backward pass, instead of kept.

Memory for time, and not a bit of difference: what adapters drop is drawn by hashing the step, not
from a generator, and so is dropped again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lyco_lab.errors import UserError


@contextmanager
def recomputing(models: Sequence[Any]) -> Iterator[None]:
    """In these models of diffusers and transformers, while the context is open."""
    for model in models:
        _turn_on(model)
    try:
        yield
    finally:
        for model in models:
            _turn_off(model)


def again(block: Any, *inputs: Any) -> Any:
    return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def _turn_on(model: Any) -> None:
    if hasattr(model, "enable_gradient_checkpointing"):  # diffusers
        model.enable_gradient_checkpointing(again)
        return
    blocks = _blocks(model)
    if not blocks:
        kind = type(model).__name__
        raise UserError(f"train.gradient_checkpointing is true, but {kind} has no blocks for it")
    for block in blocks:
        # What `gradient_checkpointing_enable` sets; it asks for blocks, though not the layers
        # inside them, to be in training mode.
        block.gradient_checkpointing = block.training = True
        block._gradient_checkpointing_func = again


def _turn_off(model: Any) -> None:
    if hasattr(model, "disable_gradient_checkpointing"):
        model.disable_gradient_checkpointing()
        return
    for block in _blocks(model):
        block.gradient_checkpointing = block.training = False


def _blocks(model: nn.Module) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
