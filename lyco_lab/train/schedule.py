"""What share of its learning rate a run has at step n = 0, 1, …

    share(n) = min(1, (n + 1) / warmup_steps)       in the warm-up of W steps, then, with S steps,
    share(n) = end + (1 - end) f(p),                p = (n - W) / (S - W), from 0 up to less than 1

    constant           f = 1
    linear             f = 1 - p
    polynomial         f = (1 - p)**power
    cosine             f = (1 + cos(pi p)) / 2
    cosine_restarts    the same of the fraction of p (restarts + 1): that many + 1 equal falls

A function of the step alone: nothing to save, and nothing to restore. No step after the warm-up has
a share of 0, which it would be wasted on.

Reference: SGDR: Stochastic Gradient Descent with Warm Restarts (Loshchilov and Hutter, 2017),
https://arxiv.org/abs/1608.03983
"""

import math

from lyco_lab.config import Train


def share(settings: Train, step: int) -> float:
    """Of each learning rate, at this step of the optimizer."""
    warmup = settings.warmup
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    if settings.schedule == "constant":
        return 1.0
    after, left = step - warmup, settings.steps - warmup
    end = settings.schedule_end or 0.0
    return end + (1 - end) * _fall(settings, after, left)


def _fall(settings: Train, after: int, left: int) -> float:
    """f, after so many of the steps that are left at the warm-up's end."""
    if settings.schedule == "cosine_restarts":
        # In whole numbers, since a rounded p could miss the step of a restart.
        p = after * ((settings.schedule_restarts or 0) + 1) % left / left
    else:
        p = after / left
    if settings.schedule.startswith("cosine"):
        return (1 + math.cos(math.pi * p)) / 2
    return float((1 - p) ** (settings.schedule_power or 1.0))
