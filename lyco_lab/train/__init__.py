"""A run -> trained factors.

    stage.py       the stage itself: load, cache, mount, fit, export
    fitting.py     the steps, by Lightning's Trainer
    processes.py   several processes, one for each device
    sharing.py     frozen weights shared out among them
    feed.py        the batches of a run's steps
    noise.py       timesteps and noise as settings ask for them
    loss.py        how errors are measured, and how much each timestep counts
    module.py      the LightningModule: the loss of a batch and one step of the optimizer
    optimizer.py   groups of factors, clipping, the average of the factors
    schedule.py    the learning rate at each step
    callbacks.py   what happens between steps: rows, checkpoints, samples, Ctrl-C
    plugged.py     callbacks and loggers that the run names
    validation.py  the loss on images that are not trained on
    divergence.py  when a run is stopped for getting worse
    exact.py       algorithms that give the same bits each time
    checkpoint.py  the state of a run on disk
    recompute.py   values of the forward pass that are computed twice instead of kept
    journal.py     train/metrics.csv
    guard.py       which layer a number that is not finite comes from

Two runs of one configuration on one machine end with the same bits, whether or not they were
killed in between: everything random is drawn from (seed, step, rank), and a checkpoint holds
everything else that moves.
"""

from lyco_lab.train.module import suits
from lyco_lab.train.plugged import check as plugs
from lyco_lab.train.stage import embedding_file, train

__all__ = ["embedding_file", "plugs", "suits", "train"]
