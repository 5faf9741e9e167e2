"""Random states that are the same afterwards, around what is not a measurement: iterating over a loader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """PyTorch's random states, on all devices that are in use, are as before afterwards.

    A `DataLoader` draws the seed of its workers from the global generator each time it is started. One with a generator
    of its own has to be the tracker's alone.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
