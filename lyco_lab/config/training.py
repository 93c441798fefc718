"""The sections `train`, `embedding` and `trainer` of a run: how it is trained, and on what.

`train` is made of the classes before it, in the order in which a step uses them; in a study's YAML
all of their settings stand side by side.
"""

import math
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any

from lyco_lab.config.checks import at_least, choose, goes_with, need, positive
from lyco_lab.config.groups import Group
from lyco_lab.errors import UserError
from lyco_lab.settings import PATH, POSITIVE, SHARE, STEPS, Within
from lyco_lab.user_classes import is_path

BATCH = Within(1, 2**16)
LONGEST_TOKEN = 64
WARMUP = 20  # steps, where nothing else is said
CHECK_EVERY, CHECKS = 50, 3  # on divergence, where nothing else is said
LOSSES = ("mse", "huber", "smooth_l1")
SAMPLINGS = ("uniform", "logit_normal")
ACCELERATORS = ("auto", "cpu", "gpu")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")
SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts", "polynomial")


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Which noise and timesteps are drawn (lyco_lab/train/noise.py)."""

    timestep_sampling: str = "uniform"
    logit_mean: Annotated[float | None, Within(-100, 100)] = None
    logit_std: Annotated[float | None, Within(1e-6, 100)] = None
    min_timestep: Annotated[int | None, Within(0, 10**6)] = None
    max_timestep: Annotated[int | None, Within(1, 10**6)] = None
    noise_offset: Annotated[float | None, Within(1e-30, 100)] = None
    multires_noise_iterations: Annotated[int | None, Within(1, 16)] = None
    multires_noise_discount: Annotated[float | None, SHARE] = None
    input_perturbation: Annotated[float | None, Within(1e-30, 100)] = None

    def _check_noise(self) -> None:
        choose("train.timestep_sampling", self.timestep_sampling, SAMPLINGS)
        logit = self.timestep_sampling == "logit_normal"
        for key in ("logit_mean", "logit_std"):
            value = getattr(self, key)
            goes_with(f"train.{key}", value, "train.timestep_sampling=logit_normal", given=logit)
            finite = value is None or math.isfinite(value)
            need(finite, f"train.{key}", value, "a finite number")
        positive("train.logit_std", self.logit_std)
        at_least("train.min_timestep", self.min_timestep, 0)
        at_least("train.max_timestep", self.max_timestep, 1)
        low, high = self.min_timestep or 0, self.max_timestep
        if high is not None:
            needed = f"more than min_timestep = {low}"
            need(low < high, "train.max_timestep", high, needed)
        positive("train.noise_offset", self.noise_offset)
        positive("train.input_perturbation", self.input_perturbation)
        iterations, discount = self.multires_noise_iterations, self.multires_noise_discount
        at_least("train.multires_noise_iterations", iterations, 1)
        multires = iterations is not None
        other = "train.multires_noise_iterations"
        goes_with("train.multires_noise_discount", discount, other, given=multires)
        small = discount is None or 0 < discount <= 1
        need(small, "train.multires_noise_discount", discount, "a number in (0, 1]")
        if multires and self.noise_offset is not None:
            raise UserError(
                f"train.noise_offset is {self.noise_offset!r} and train.multires_noise_iterations "
                f"is {iterations!r}: both move the mean of the noise, use one of them"
            )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What is made small (lyco_lab/train/loss.py)."""

    loss: str = "mse"
    huber_delta: Annotated[float | None, POSITIVE] = None
    min_snr_gamma: Annotated[float | None, POSITIVE] = None
    debiased: bool = False

    def _check_loss(self) -> None:
        choose("train.loss", self.loss, LOSSES)
        robust = self.loss != "mse"
        needed = "train.loss=huber or smooth_l1"
        goes_with("train.huber_delta", self.huber_delta, needed, given=robust)
        positive("train.huber_delta", self.huber_delta)
        positive("train.min_snr_gamma", self.min_snr_gamma)
        if self.debiased and self.min_snr_gamma is not None:
            raise UserError(
                f"train.min_snr_gamma is {self.min_snr_gamma!r} and train.debiased is true: both "
                "weigh the timesteps, use one of them"
            )


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast it learns, and when (lyco_lab/train/schedule.py)."""

    steps: Annotated[int, STEPS] = 300
    lr: Annotated[float, POSITIVE] = 1e-3
    text_encoder_lr: Annotated[float | None, POSITIVE] = None
    # None: WARMUP steps, and half of the steps of a run that has no more than that.
    warmup_steps: Annotated[int | None, Within(0, 10**8)] = None
    schedule: str = "constant"
    schedule_end: Annotated[float | None, SHARE] = None
    schedule_restarts: Annotated[int | None, STEPS] = None
    schedule_power: Annotated[float | None, Within(1e-6, 100)] = None

    def _check_rates(self) -> None:
        at_least("train.steps", self.steps, 1)
        for key in ("lr", "text_encoder_lr"):
            positive(f"train.{key}", getattr(self, key))
        if self.warmup_steps is None:
            short = self.steps <= WARMUP
            object.__setattr__(self, "warmup_steps", self.steps // 2 if short else WARMUP)
        needed = f"0 <= warmup_steps < steps = {self.steps}"
        need(0 <= self.warmup < self.steps, "train.warmup_steps", self.warmup_steps, needed)
        choose("train.schedule", self.schedule, SCHEDULES)
        restarts, power, end = self.schedule_restarts, self.schedule_power, self.schedule_end
        falls = "a train.schedule that falls"
        goes_with("train.schedule_end", end, falls, given=self.schedule != "constant")
        need(end is None or 0 <= end < 1, "train.schedule_end", end, "a number in [0, 1)")
        for key, value, kind in (
            ("restarts", restarts, "cosine_restarts"),
            ("power", power, "polynomial"),
        ):
            given = self.schedule == kind
            goes_with(f"train.schedule_{key}", value, f"train.schedule={kind}", given=given)
            if given and value is None:
                raise UserError(f"train.schedule is {kind!r}, which needs train.schedule_{key}")
        positive("train.schedule_power", power)
        if restarts is not None:
            left = self.steps - self.warmup
            most = left // 2 - 1
            needed = f"1 to {most}, so that each fall has two of the {left} steps after the warm-up"
            need(1 <= restarts <= most, "train.schedule_restarts", restarts, needed)

    @property
    def warmup(self) -> int:
        """Steps in which the rate grows."""
        return typing.cast(int, self.warmup_steps)

    def rate(self, part: str) -> float:
        """The learning rate of a part of the model, before its schedule."""
        own = self.text_encoder_lr if part.startswith("text_encoder") else None
        return self.lr if own is None else own


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is looked at on the way (lyco_lab/train/validation.py, divergence.py)."""

    checkpoint_every: Annotated[int, STEPS] = 100
    sample_every: Annotated[int | None, STEPS] = None
    validate_every: Annotated[int | None, STEPS] = None
    validation_share: Annotated[float | None, SHARE] = None
    validation_folder: Annotated[str | None, PATH] = None
    stop_on_divergence: Annotated[float | None, Within(1, 1e30)] = None
    divergence_checks: Annotated[int | None, STEPS] = None

    def _check_watch(self, steps: int) -> None:
        for key in ("checkpoint_every", "sample_every", "validate_every", "divergence_checks"):
            at_least(f"train.{key}", getattr(self, key), 1)
        for key, what in (("sample_every", "sample is drawn"), ("validate_every", "check is made")):
            value = getattr(self, key)
            needed = f"null or at most steps = {steps}, else no {what}"
            need(value is None or value <= steps, f"train.{key}", value, needed)
        share, folder = self.validation_share, self.validation_folder
        for key, value in (("share", share), ("folder", folder)):
            given = self.validate_every is not None
            goes_with(f"train.validation_{key}", value, "train.validate_every", given=given)
        need(share is None or 0 < share < 1, "train.validation_share", share, "between 0 and 1")
        need(folder != "", "train.validation_folder", folder, "null or a folder")
        if self.validate_every is not None and (share is None) == (folder is None):
            raise UserError(
                f"train.validate_every is {self.validate_every}, and train.validation_share is "
                f"{share!r} and train.validation_folder {folder!r}: give one of these two"
            )
        factor, checks = self.stop_on_divergence, self.divergence_checks
        given = factor is not None
        goes_with("train.divergence_checks", checks, "train.stop_on_divergence", given=given)
        right = factor is None or (math.isfinite(factor) and factor > 1)
        need(right, "train.stop_on_divergence", factor, "null or a finite number > 1")
        if given and steps // self.check_every <= self.checks:
            raise UserError(
                f"train.stop_on_divergence is {factor!r} after {self.checks} checks, of which one "
                f"is made every {self.check_every} steps: in steps = {steps} that cannot happen"
            )

    @property
    def check_every(self) -> int:
        """Steps between two checks on divergence."""
        return CHECK_EVERY if self.validate_every is None else self.validate_every

    @property
    def checks(self) -> int:
        """So many bad ones in a row are divergence."""
        return CHECKS if self.divergence_checks is None else self.divergence_checks


@dataclass(frozen=True, kw_only=True)
class Train(Noise, Loss, Rates, Watch):
    batch_size: Annotated[int, BATCH] = 4
    accumulate: Annotated[int, BATCH] = 1
    gradient_checkpointing: bool = False
    grad_clip: Annotated[float | None, POSITIVE] = 1.0
    ema_decay: Annotated[float | None, SHARE] = None
    caption_dropout: Annotated[float, SHARE] = 0.05
    init_scale: Annotated[float, POSITIVE] = 1.0
    groups: tuple[Group, ...] = ()

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.accumulate

    def __post_init__(self) -> None:
        self._check_noise()
        self._check_loss()
        self._check_rates()
        self._check_watch(self.steps)
        for key in ("batch_size", "accumulate"):
            at_least(f"train.{key}", getattr(self, key), 1)
        for key in ("grad_clip", "init_scale"):
            positive(f"train.{key}", getattr(self, key))
        dropout, decay = self.caption_dropout, self.ema_decay
        need(0 <= dropout <= 1, "train.caption_dropout", dropout, "a number in [0, 1]")
        need(decay is None or 0 < decay < 1, "train.ema_decay", decay, "null or between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A token of its own for the concept, whose vector trains beside the adapter."""

    token: str | None = None
    init: str | None = None
    lr: Annotated[float | None, POSITIVE] = None

    def __post_init__(self) -> None:
        given = self.token is not None
        for key in ("init", "lr"):
            goes_with(f"embedding.{key}", getattr(self, key), "embedding.token", given=given)
        if self.token is not None:
            plain = self.token.replace("-", "").replace("_", "")
            needed = "a word of letters, digits, '-' and '_', as it names a file"
            need(plain.isascii() and plain.isalnum(), "embedding.token", self.token, needed)
            needed = f"at most {LONGEST_TOKEN} characters, as it names a file"
            need(len(self.token) <= LONGEST_TOKEN, "embedding.token", self.token, needed)
            needed = "words from whose mean the token starts, such as its class"
            need(bool((self.init or "").strip()), "embedding.init", self.init, needed)
        positive("embedding.lr", self.lr)


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A class of Lightning's kinds, and what it is made of (lyco_lab/train/plugged.py)."""

    class_path: str = ""
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needed = "package.module.Class"
        right = is_path(self.class_path)
        need(right, "class_path of a callback or logger", self.class_path, needed)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What Lightning's Trainer is told; of what a run is, callbacks alone are a part."""

    accelerator: str = "auto"
    devices: Annotated[int, Within(1, 1024)] = 1
    strategy: str = "auto"
    callbacks: tuple[Plugin, ...] = ()
    loggers: tuple[Plugin, ...] = ()

    def __post_init__(self) -> None:
        choose("trainer.accelerator", self.accelerator, ACCELERATORS)
        at_least("trainer.devices", self.devices, 1)
        if self.strategy.startswith("deepspeed"):
            raise UserError(
                f"trainer.strategy is {self.strategy!r}, but DeepSpeed is no dependency: what its "
                "stages would share of adapters, the frozen weights, 'fsdp' shares"
            )
        choose("trainer.strategy", self.strategy, STRATEGIES)
        if self.strategy != "auto" and self.devices == 1:
            raise UserError(
                f"trainer.strategy is {self.strategy!r}, but trainer.devices is 1: there is "
                "nothing to average or share, needs 'auto'"
            )
