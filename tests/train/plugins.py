"""Callbacks as a user would write them, for runs to name."""

import lightning.pytorch as lightning
import torch


class Counting(lightning.Callback):
    """Counts steps, says what it finds, and can stop a run; what it saw is in `seen`."""

    seen: list = []  # noqa: RUF012 - of all instances, since runs make their own

    def __init__(self, stop_at=None, micro=False):
        self.stop_at, self.micro, self.steps = stop_at, micro, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch.last:
            self.steps += 1
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            self.seen.append((self.steps, trainer.global_step, metrics))
        if self.stop_at == batch.step + 1 and batch.last != self.micro:
            trainer.should_stop = True

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Moving(lightning.Callback):
    """Makes factors smaller after every step."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for factor in module.trained:
            factor.mul_(0.99)


class Meddling(lightning.Callback):
    """Does one thing that would make the exported adapter another than the one that trained."""

    def __init__(self, how, when="on_train_end"):
        def hook(trainer, module, *_):
            if not (when == "on_train_batch_start" and trainer.global_step < 3):
                getattr(self, how)(trainer, module)

        setattr(self, when, hook)
        self.start = None

    def on_fit_start(self, trainer, module):
        self.start = [factor.detach().clone() for factor in module.trained]

    @torch.no_grad()
    def swap(self, trainer, module):
        for factor, before in zip(module.trained, self.start, strict=True):
            factor.copy_(before)

    @torch.no_grad()
    def swap_average(self, trainer, module):
        for value in module.average.values.values():
            value.zero_()

    @torch.no_grad()
    def swap_state(self, trainer, module):
        """What an optimizer that averages makes its average of."""
        for state in module.optimizer.state.values():
            state["z"].zero_()

    def replace(self, trainer, module):
        mount = next(iter(module.mounted["unet"]._mounts.values()))
        for name, factor in list(mount.factors.items()):
            mount.factors[name] = torch.nn.Parameter(factor.detach().clone())

    def freeze(self, trainer, module):
        for factor in module.trained:
            factor.requires_grad_(False)

    def accumulate(self, trainer, module):
        trainer.accumulate_grad_batches = 2

    def leave(self, trainer, module):
        raise StopIteration


class Averaging(lightning.callbacks.WeightAveraging):
    """A subclass is of its base's kind."""


class Odd(lightning.Callback):
    """Its state is no plain thing."""

    def state_dict(self):
        return {"self": Odd}


class Broken(lightning.Callback):
    def __init__(self):
        raise ValueError("no screen")


class NoCallback:
    pass
