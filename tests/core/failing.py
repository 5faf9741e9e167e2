"""What tests of failures share: a model, disks and services that fail, and what was warned of."""

from __future__ import annotations

import errno
import warnings

import numpy as np

import lnp_numpy
from lnp.tracking.storage import Appender

GENERATOR = np.random.default_rng(0)
MODEL = lnp_numpy.LinearModel(weight=GENERATOR.standard_normal((3, 2)))
BATCH = (GENERATOR.standard_normal((8, 3)), GENERATOR.standard_normal((8, 2)))
BAD = (GENERATOR.standard_normal((8, 5)), GENERATOR.standard_normal((8, 2)))
"""A batch that the model cannot take."""


def watch(tracker, steps, batch=BATCH):
    return [step for step in steps if tracker.observe(step, MODEL, batch) is not None]


def told(caught):
    return [str(warning.message) for warning in caught]


def recorded():
    """What is warned of inside."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def full_disk(monkeypatch):
    """A disk that is full while the list is empty."""
    room, append = [], Appender.append

    def where_room_is(self, record):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, record)

    monkeypatch.setattr(Appender, "append", where_room_is)
    return room


def failing_disk(monkeypatch):
    """A disk that fails when a file is closed."""
    close = Appender.close

    def closed(self):
        close(self)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Appender, "close", closed)


class Torn:
    """A loader one of whose batches cannot be read."""

    def __iter__(self):
        return Torn.Batches()

    class Batches:
        def __init__(self):
            self.count = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.count += 1
            if self.count == 2:
                raise OSError("cannot read a batch")
            return (BATCH[0][: self.count + 3], BATCH[1][: self.count + 3])
