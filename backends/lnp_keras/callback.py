"""A callback for `fit`, on each framework that Keras runs on.

    model.fit(x, y, callbacks=[LNPCallback(data=(x[:256], y[:256]), path="run.jsonl")])

Keras tells callbacks the number of a batch, but never its data: what is measured on is given to the callback. Where
nothing is due the model is not touched, which on JAX would make Keras rebuild its state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Unpack

import keras

from lnp.tracking.tracker import Tracker
from lnp.typed_options import WatchOptions


class LNPCallback(keras.callbacks.Callback):
    """Measures a model while `fit` trains it.

    Parameters
    ----------
    data:
        A batch (inputs, targets) or (inputs, targets, sample_weight) to measure on, or something to iterate over, such
        as a `PyDataset` of its own, which is gone through again and again.
    path, schedule, options:
        Of `lnp.Tracker`; or a Tracker, made with `batch=`, in the place of the data. The loss is the compiled one.

    What fails on the way is told once, and the fit goes on (`on_error` of the tracker).

    Steps are the optimizer's iterations, also over several calls of `fit` and after restoring a checkpoint. With
    `steps_per_execution=n` Keras calls every n steps: what is due among them is measured before the first of them.

    Raises
    ------
    TypeError
        If a tracker and options of another one are given.
    """

    def __init__(self, data: Any, path: Any = None, schedule: Any = None, **options: Unpack[WatchOptions]) -> None:
        super().__init__()
        if isinstance(data, Tracker) and (path is not None or schedule is not None or options):
            raise TypeError(
                "LNPCallback received a tracker, and options beside it. Expected one of the two: give the options to "
                "the tracker."
            )
        self.tracker = data if isinstance(data, Tracker) else Tracker(path, schedule, batch=data, **options)
        self._before: int | None = None
        self._every, self._together = 1, 1
        self._rate: tuple[Any, str] = None, ""

    def on_train_begin(self, logs: Any = None) -> None:
        """Say now if the model cannot be measured; find how many batches an update takes and how many run at once."""
        self.tracker.check(self.model)
        with self.tracker.attempt(None, "the number of parameters in rows"):
            self.tracker.tags.setdefault("parameters", trained(self.model))
        self._every = getattr(self.model.optimizer, "gradient_accumulation_steps", None) or 1
        self._together = getattr(self.model, "steps_per_execution", None) or 1

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """The batches before this epoch; where they cannot be told, its steps have no numbers."""
        self._before = None
        with self.tracker.attempt(None, "measurements in this epoch"):
            self._before = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) * self._every

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Measure if one of the updates that come now is due."""
        if self._before is None:
            return
        first, last = (self._before + b for b in (batch, batch + self._together - 1))
        steps = range(first // self._every, last // self._every + 1)
        if any(map(self.tracker.due, steps)):
            self.tracker.measure(steps[0], self.model)
        with self.tracker.attempt(None, "the net rate, for which the learning rate is read"):
            self._count(steps)

    def _count(self, steps: range) -> None:
        """The learning rates of these updates. On JAX the variable holds none while a step has the optimizer's state;
        it is what it was then, unless somebody brings the state back to change it.
        """
        if getattr(self.model, "_jax_state_synced", True):
            self._rate = step_size(self.model.optimizer)
        rate, reason = self._rate
        for step in steps:
            self.tracker.count(step, rate(step) if callable(rate) else rate, reason)

    def on_train_end(self, logs: Any = None) -> None:
        """Let others write to the file."""
        self.tracker.close()


def step_size(optimizer: Any) -> tuple[float | Callable[[int], float], str]:
    """(Learning rate of the next update, or of each for a schedule; why that is none of gradient descent, or "").

    With momentum m a gradient moves weights by learning_rate / (1 - m) in the end, which is what counts.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales losses
    plain, name = isinstance(optimizer, keras.optimizers.SGD), type(optimizer).__name__
    factor = 1 / (1 - optimizer.momentum) if plain else 1.0
    every = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    given = getattr(optimizer, "_learning_rate", None)
    reason = "" if plain else f"{name} rescales the gradient"
    if not isinstance(given, keras.optimizers.schedules.LearningRateSchedule):
        return factor * float(keras.ops.convert_to_numpy(optimizer.learning_rate)), reason

    def of_step(step: int) -> float:
        return factor * float(keras.ops.convert_to_numpy(given(step * every + every - 1)))

    return of_step, reason


def trained(model: Any) -> int:
    """Number of trained parameters."""
    return sum(math.prod(variable.shape) for variable in model.trainable_variables)
