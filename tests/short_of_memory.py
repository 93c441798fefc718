"""A network that runs out of memory where its batch is too large."""

import torch


def out_of_memory():
    """As torch says it of a GPU."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def limited(monkeypatch, network, method, most, fail=out_of_memory):
    """From now on `network.method` fails on more than `most` samples; returns the sizes it saw."""
    work, seen = getattr(network, method), []

    def working(sample, *arguments, **others):
        seen.append(len(sample))
        if len(sample) > most:
            fail()
        return work(sample, *arguments, **others)

    monkeypatch.setattr(network, method, working)
    return seen
