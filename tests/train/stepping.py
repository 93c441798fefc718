"""Something that happens in the middle of a training."""

from lyco_lab.train.callbacks import Rows


def at_step(monkeypatch, step, do):
    """Call `do` once the row of this step is written."""
    rows_end = Rows.on_train_batch_end

    def hooked(self, trainer, module, outputs, batch, batch_idx):
        rows_end(self, trainer, module, outputs, batch, batch_idx)
        if batch.last and batch.step + 1 == step:
            do()

    monkeypatch.setattr(Rows, "on_train_batch_end", hooked)
