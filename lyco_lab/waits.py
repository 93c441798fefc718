"""Where the processor waits for numbers that a device computes, and why.

A GPU works through a queue of operations. A number is read from it once the queue is empty, and
nothing is added meanwhile: in a loop, the device stands idle after each reading. So numbers are
read by `host` alone, with one of the reasons below, and tests/accelerator runs training, sampling
and encoders on a device where any other reading raises an error. Saving is not listed: checkpoints,
and the adapter at the end, are copied as a whole.
"""

import torch
from torch import Tensor

REASONS = {
    "weights": "once for each layer, when an adapter is attached: a frozen weight that is not "
    "finite is an error before anything trains",
    "merged": "once for each tensor that an adapter is merged into: a sum that it cannot hold is "
    "an error before anything is drawn",
    "step": "once in each step, after its backward pass: a loss or gradient that is not finite "
    "must never reach the factors, gradients are clipped by their norm, and the row of a step is "
    "in metrics.csv once the step is over, so that a killed process loses none",
    "norms": "every tenth step: delta_norm in metrics.csv",
    "validation": "once in each validation: its loss",
    "digest": "after the last step: factors that are exported are those that trained",
    "images": "once for each batch that is drawn and once when it is decoded: the images "
    "themselves, and whether they are finite",
    "features": "for each batch of images or texts that is scored: what the encoders say of it",
}


def host(tensor: Tensor, why: str) -> Tensor:
    """A copy of the tensor in the processor's memory, for one of `REASONS`."""
    if why not in REASONS:
        raise ValueError(f"{why!r} is no reason to wait for a device; known: {', '.join(REASONS)}")
    return tensor.detach().to(torch.device("cpu"))
