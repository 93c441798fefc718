"""The one training loop that every part of the miniature is pretrained with.

A loss is a function of the step alone: whatever it draws comes from generators seeded by
(seed, part, step). So a run that was killed and run again ends at the same weights.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lyco_lab.files import atomic

Loss = Callable[[int], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Warm-up, constant, then half a cosine down to `floor` of the learning rate."""

    steps: int
    lr: float
    warmup: int = 100
    decay_from: float = 0.0  # the share of the steps after which the rate falls
    floor: float = 0.02
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)

    def at(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        progress = (step / self.steps - self.decay_from) / (1 - self.decay_from)
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return self.lr * rise * max(self.floor, fall)


class Average:
    """Exponential moving average of a model's floating-point state, started quickly."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - keep)
            else:
                self.state[name].copy_(value)


def fit(
    part: str,
    work: Path,
    model: nn.Module,
    loss: Loss,
    schedule: Schedule,
    *,
    ema: float | None = None,
    save_every: int = 500,
    say: Callable[[str], None] = print,
) -> nn.Module:
    """Train `model` in place, resuming from `work/PART.ckpt`; with `ema`, end on the average."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay
    )
    average = Average(model, ema) if ema else None
    checkpoint, first = work / f"{part}.ckpt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if average:
            average.state = saved["average"]
        first = saved["step"]
        if first < schedule.steps:
            say(f"{part}: going on from step {first}")
    model.train()
    start, told, running = time.monotonic(), time.monotonic(), 0.0
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if average:
            average.update(model, step)
        running = value.item() if step == first else 0.98 * running + 0.02 * value.item()
        if not math.isfinite(running):
            raise FloatingPointError(f"{part}: the loss is {running} at step {step}")
        done = step + 1
        if done % save_every == 0 or done == schedule.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            if average:
                state["average"] = average.state
            with atomic(checkpoint) as path:
                torch.save(state, path)
        now = time.monotonic()
        if now - told > 20 or done == schedule.steps:
            told, left = now, (now - start) / (done - first) * (schedule.steps - done) / 60
            say(f"{part}: step {done}/{schedule.steps}  loss {running:.4f}  {left:.1f} min left")
    if average:
        model.load_state_dict(average.state)
    return model.eval()
