"""Which device the networks of a run are on, in each of its stages."""

import torch

from lyco_lab.config import Run
from lyco_lab.errors import UserError


def device(run: Run, rank: int = 0, needed: int = 1) -> torch.device:
    """The device of the process of this rank, as `trainer.accelerator` says.

    `needed`: how many of them the stage uses at a time. Raises `UserError` where there are fewer.
    """
    asked, here = run.trainer.accelerator, torch.cuda.device_count()
    if asked == "cpu" or (asked == "auto" and here == 0):
        return torch.device("cpu")
    if here < needed:
        raise UserError(
            f"trainer.devices is {run.trainer.devices} and trainer.accelerator is {asked!r}, but "
            f"there {'is' if here == 1 else 'are'} {here} GPU{'s' * (here != 1)} here; "
            "trainer.accelerator=cpu uses none"
        )
    return torch.device("cuda", rank)
