"""The diffusion loss, and one step of training on it.

    loss = mean((denoiser(z_t, t, c) - target)**2)

with z_t a latent z made noisy with the noise e at the timestep t, all of which the batch brings, c
what the denoiser is told, and z_t and the target as the model's objective has them: for most,
z_t = sqrt(a_t) z + sqrt(1 - a_t) e, and the target is e. Settings may measure and weigh the errors
in other ways (loss.py). Only factors train; the model around them is frozen, and stays in
evaluation mode. Factors are float32 whatever the model is in, and so is the loss.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn

from lyco_lab import waits
from lyco_lab.adapters.mount import Mounted
from lyco_lab.config import Train
from lyco_lab.config.groups import check
from lyco_lab.data.batches import Batch
from lyco_lab.diffusion.model import Diffusion
from lyco_lab.diffusion.objective import Objective
from lyco_lab.diffusion.word import Word
from lyco_lab.optimizers.base import Optimizer
from lyco_lab.train import guard, loss, noise, optimizer, schedule
from lyco_lab.train.checkpoint import State

WORD = "embedding"  # what a word's vectors are called beside the factors


def suits(settings: Train, objective: Objective) -> None:
    """Raise an error for settings that make no sense for what the model predicts."""
    loss.check(settings, objective)
    noise.check(settings, objective)


class Training(lightning.LightningModule):
    """Adapters mounted on a model, and how a batch moves them."""

    def __init__(
        self,
        diffusion: Diffusion,
        mounted: Mapping[str, Mounted],
        settings: Train,
        rule: Optimizer,
        words: Mapping[str, Word] | None = None,
        word_lr: float | None = None,
    ) -> None:
        """`words`: of text encoders, that train with a learning rate of their own."""
        super().__init__()
        self.diffusion = diffusion
        self.mounted = dict(mounted)
        self.words = dict(words or {})
        self.settings = settings
        self.rule = rule
        self.models = nn.ModuleDict(diffusion.parts)  # for Lightning to see the parameters
        factors = [
            optimizer.Factor(part, layer, name, cast(nn.Parameter, factor))
            for part, m in self.mounted.items()
            for layer in m.layers
            for name, factor in m.factors(layer).items()
        ]
        check(settings.groups, [factor.place for factor in factors])
        suits(settings, diffusion.objective)
        trained = [factor for factor in factors if factor.parameter.requires_grad]
        self.trained = [factor.parameter for factor in trained]
        self.clip_weights = optimizer.weights(settings, trained)
        groups = optimizer.groups(settings, rule, trained)
        for part, word in self.words.items():
            self.trained.append(word.vector_1D)
            self.clip_weights.append(1.0)
            groups.append(optimizer.of_word(part, word.vector_1D, word_lr, rule))
        self.optimizer = optimizer.build(rule, groups)
        self.rules = [group.rule for group in groups]
        decay = settings.ema_decay
        self.average = None if decay is None else optimizer.Average(self.factors(), decay)
        self.row: dict[str, float | None] = {}  # the current step's, filled as it proceeds
        self.losses: list[tuple[Tensor, Batch]] = []  # of its micro-batches

    def factors(self) -> dict[str, nn.Parameter]:
        """'part.layer.factor' -> parameter, in the order of the models; words come last."""
        factors = {
            f"{part}.{name}": factor
            for part, mounted in self.mounted.items()
            for name, factor in mounted.named_factors().items()
        }
        return factors | {f"{part}.{WORD}": word.vector_1D for part, word in self.words.items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        for mounted in self.mounted.values():
            mounted.train()
            # What is dropped depends on these alone, also after an interruption.
            mounted.step, mounted.part = batch.step, batch.part
        share = self.set_rates(batch.step)
        share *= self.rule.rate(batch.step)
        text = self.settings.rate("text_encoder") if "text_encoder" in self.mounted else None
        self.losses = self.losses if self.row.get("step") == batch.step + 1 else []
        self.row = {
            "step": batch.step + 1,
            "lr": self.settings.rate("unet") * share,
            "lr_text_encoder": None if text is None else text * share,
        }

    def set_rates(self, step: int) -> float:
        """The learning rates of a step; the schedule's share in them."""
        share = schedule.share(self.settings, step)
        own = [rule.rate(step) for rule in self.rules]
        optimizer.set_rates(self.optimizer, [share * rate for rate in own])
        return share

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        found = self.loss(batch)
        self.losses.append((self.over_processes(found.detach()), batch))
        return found

    def has_idle_factors(self, batch: Batch) -> bool:
        """Whether the loss does not depend on some factor that trains, whatever its value."""
        moved = self.transfer_batch_to_device(batch, self.diffusion.denoiser.device, 0)
        with torch.enable_grad():
            found = torch.autograd.grad(self.loss(moved), self.trained, allow_unused=True)
        return any(gradient is None for gradient in found)

    def over_processes(self, value: Tensor) -> Tensor:
        """The mean of a number over all processes: what one says of it, all say."""
        if torch.distributed.is_initialized():
            value = self.trainer.strategy.reduce(value.clone(), reduce_op="mean")
        return value

    def loss(self, batch: Batch) -> Tensor:
        z, e, t = batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B
        objective, p = self.diffusion.objective, batch.perturbation_BCHW
        conditioning = self.diffusion.condition(batch.text, batch.sizes)
        noisy = objective.noisy(z, e if p is None else e + p, t)
        predicted = self.diffusion.predict(noisy, t, conditioning)
        target = objective.target(z, e, t)
        return loss.loss(self.settings, objective, predicted, target, t, batch.weights)

    def configure_gradient_clipping(
        self,
        optimizer_: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's place for this, between the backward pass and the optimizer's step."""
        norm = optimizer.norm(self.trained, self.clip_weights)
        # All numbers of the step at once, and before anything has used them.
        numbers = torch.stack([*(loss for loss, _ in self.losses), norm])
        *losses, grad_norm = waits.host(numbers, "step").tolist()
        for value, (_, batch) in zip(losses, self.losses, strict=True):
            if not math.isfinite(value):
                raise self.not_finite(f"the loss is {value}", batch)
        if not math.isfinite(grad_norm):
            raise self.not_finite(f"the norm of the gradients is {grad_norm}")
        self.row["loss"] = sum(losses) / len(losses)
        self.row["grad_norm"] = grad_norm
        optimizer.clip(self.trained, self.settings.grad_clip, grad_norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for mounted in self.mounted.values():
            mounted.limit_norms()
            mounted.eval()
        if self.average is not None:
            self.average.update()

    def delta_norm(self) -> float:
        """The Frobenius norm of W' - W, over all adapted layers together."""
        return math.hypot(*(n for m in self.mounted.values() for n in m.norms().values()))

    def digest(self) -> bytes:
        """Of every bit of the factors."""
        found = hashlib.blake2b(digest_size=16)
        for factor in self.factors().values():
            found.update(waits.host(factor, "digest").contiguous().numpy().data)
        return found.digest()

    def exported_digest(self) -> bytes:
        """Of every bit of the factors as they are to be used."""
        with self.exported():
            return self.digest()

    def exchanged(self) -> list[str]:
        """The factors that are no longer the parameters which the optimizer moves."""
        moved = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return [
            name
            for name, factor in self.factors().items()
            if factor.requires_grad != (id(factor) in moved)
        ]

    def state(self, step: int, seconds: float) -> State:
        """Everything that moves, after `step` steps; shares the tensors' memory."""
        average = self.average
        return State(
            step=step,
            factors={part: m.state_dict() for part, m in self.mounted.items()} | self._vectors(),
            average=None if average is None else average.values,
            optimizer=self.optimizer.state_dict(),
            seconds=seconds,
            threads=torch.get_num_threads(),
        )

    def _vectors(self) -> dict[str, dict[str, Tensor]]:
        vectors = {part: word.vector_1D.detach() for part, word in self.words.items()}
        return {WORD: vectors} if vectors else {}

    def load_state(self, state: State) -> None:
        with torch.no_grad():
            for part, word in self.words.items():
                word.vector_1D.copy_(state.factors[WORD][part])
        for part, mounted in self.mounted.items():
            mounted.load_state_dict(state.factors[part])
        self.optimizer.load_state_dict(state.optimizer)
        if self.average is not None and state.average is not None:
            self.average.load(state.average)

    @contextmanager
    def exported(self) -> Iterator[None]:
        """The factors as they are to be used: their average, where one is kept."""
        if self.rule.averages:
            averaging: Any = self.optimizer
            kept = [factor.detach().clone() for factor in self.trained]
            averaging.eval()
            try:
                yield
            finally:
                averaging.train()
                # There and back is rounded twice, and looking must not disturb the run.
                with torch.no_grad():
                    torch._foreach_copy_(list[Tensor](self.trained), kept)
            return
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def _first_output(self, layers: Mapping[str, nn.Module], batch: Batch) -> str | None:
        for mounted in self.mounted.values():
            mounted.part = batch.part  # which may not be the last of its step
        return guard.first_output(layers, lambda: self.loss(batch))

    def not_finite(self, what: str, batch: Batch | None = None) -> guard.NotFinite:
        """An error that names the step and the first layer concerned."""
        layers = {
            f"{part}.{name}": layer
            for part, mounted in self.mounted.items()
            for name, layer in mounted.layers.items()
        }
        factors = self.factors()
        if (name := guard.first_factor(factors)) is not None:
            where = f"the factor {name} is not finite"
        elif batch is None:
            name = guard.first_gradient(factors)
            where = (
                "each gradient is finite, but their squares together exceed what float32 holds"
                if name is None
                else f"the gradient of {name} is not finite"
            )
        elif (name := self._first_output(layers, batch)) is not None:
            where = f"the output of the layer {name} is not finite"
        else:
            where = "every adapted layer's factors and outputs are finite"
        return guard.NotFinite(
            f"{what} at step {self.row['step']}: {where}. The state before that step is in "
            f"train/{guard.FILE}; try a smaller train.lr than {self.settings.lr}"
        )
