"""Images are drawn in smaller batches where memory runs out.

B images are drawn at once. If memory runs out, they are drawn from their start again, B / 2 at
once, and so on down to one by one; and latents are decoded likewise, without being drawn again. A
size that went well is kept for what follows. The VAE's tiles are not used: an image put together
from them is another one. On Linux a processor's memory may seem endless until the system ends the
process: then nothing here is asked.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from lyco_lab.errors import UserError

T = TypeVar("T")

# Of errors that are none of torch.OutOfMemoryError: allocators of processors, and libraries of a
# GPU that allocate for themselves.
PHRASES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class NoMemory(UserError):
    """Not even one image fits."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


@dataclass
class AtOnce:
    """How many images are drawn at once, and how many are decoded; None: as many as asked for."""

    drawn: int | None = None
    decoded: int | None = None

    def draw(self, count: int, work: Callable[[slice], T], one: str) -> list[T]:
        """What `work` makes of `count` images, piece by piece. `one`: an image, in words."""
        found, self.drawn = _pieces(count, self.drawn, work, "drawing", one)
        return found

    def decode(self, count: int, work: Callable[[slice], T], one: str) -> list[T]:
        found, self.decoded = _pieces(count, self.decoded, work, "decoding", one)
        return found


def _pieces(
    count: int, kept: int | None, work: Callable[[slice], T], doing: str, one: str
) -> tuple[list[T], int | None]:
    """All of one size but the last: which images share a batch depends on the size alone."""
    while True:
        size = min(count, kept or count)
        try:
            return [work(slice(i, min(i + size, count))) for i in range(0, count, size)], kept
        except Exception as error:
            if not ran_out(error):
                raise
        # Only now is the error gone, and with it what its traceback held.
        free()
        if size == 1:
            raise NoMemory(f"memory ran out while {doing} a single image of {one}")
        kept = -(-size // 2)
        print(f"memory ran out while {doing} {size} images at once: now {kept} at once")


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
