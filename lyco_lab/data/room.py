"""How many pixels are decoded at once, over all threads: what bounds the memory of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition

PIXELS = 2**27  # half a gibibyte, as Pillow takes four bytes for each


@dataclass
class Room:
    """A number of pixels that threads share. An image that is larger than all of it goes alone."""

    pixels: int = PIXELS
    _used: int = 0
    _changed: Condition = field(default_factory=Condition)

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Wait until so many are free, and have them inside the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._used + pixels <= self.pixels or not self._used)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()


ROOM = Room()  # of this process
