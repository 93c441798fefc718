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


class Odd(lightning.Callback):
    """Its state is no plain thing."""

    def state_dict(self):
        return {"self": Odd}


class Broken(lightning.Callback):
    def __init__(self):
        raise ValueError("no screen")


class NoCallback:
    pass
