"""Watches a training run: measures at scheduled steps, and keeps what was measured."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lnp.loggers import as_logger
from lnp.results import step_taken
from lnp.results.decomposition import Decomposition
from lnp.schedule import Schedule, as_schedule
from lnp.tracking.failures import ROWS, Failures
from lnp.tracking.history import History
from lnp.tracking.measurement import Measuring
from lnp.tracking.recorder import Recorder
from lnp.tracking.rows import Watched, check_options, plain
from lnp.tracking.shared_step import Shared, SharedSteps
from lnp.tracking.turns import Turns, refuse

VERSION = 1
"""Of the state that a checkpoint holds."""


class Tracker:
    """Measures a run at scheduled steps. Nothing of the run is changed, not by a bit, and a failure never ends it.

    Call `observe` at every step, before the update. It answers in about a microsecond where nothing is due; otherwise
    it measures, adds a row to `history`, appends it to the file and hands it to the loggers.

    Parameters
    ----------
    path:
        Of the history's file (JSON Lines), or None to keep it in memory only. An existing file is continued: what the
        run measures again after going back to a checkpoint replaces what was there. One tracker writes to a file.
    schedule:
        When to measure: a number of steps, a list, a function step -> bool, or one of `lnp.schedule`. Default:
        `lnp.schedule.log_windows()`.
    batch:
        A batch to measure on instead of the training batch, or something to iterate over, such as a loader, which is
        gone through again and again. Where `observe` gets a training batch as well, the row holds also how fast the
        loss on `batch` falls while the run trains on its own, under "cross/..." and "measured/...".
    tags:
        Values that are the same for the whole run, such as its width or seed: they go into every row.
    loggers:
        Where values go as well: functions (values, step), or what `lnp.loggers` makes.
    rank:
        The process's number, or a function that tells it; only number 0 measures and writes. Default: the environment
        variable RANK, else LOCAL_RANK, else 0.
    fsync:
        Wait for the disk after each record, so that a power failure loses none.
    on_error:
        What happens where measuring, writing or logging fails. "warn": a warning names each distinct reason once,
        `close` tells how often it came again, and the run goes on without that row. "raise": the error is raised.
    options:
        Of `lnp.decompose`: loss, by_layer, rtol and the others. The seed of the random signs is `seed` plus the step.

    Raises
    ------
    TypeError
        For an option that `lnp.decompose` does not have, or a schedule or logger that is none.
    ValueError
        For the value of an option that cannot be.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((2, 1)))
    >>> tracker = lnp.Tracker(schedule=10)
    >>> for step in range(21):
    ...     d = tracker.observe(step, model, (numpy.eye(2), numpy.ones((2, 1))))
    >>> tracker.history["step"]
    array([ 0, 10, 20])
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        schedule: Any = None,
        *,
        batch: Any = None,
        tags: Mapping[str, Any] | None = None,
        loggers: Any = (),
        rank: int | Callable[[], int] | None = None,
        fsync: bool = False,
        on_error: str = "warn",
        **options: Any,
    ) -> None:
        check_options(options)
        self.path = None if path is None else os.fspath(path)
        self.tags, self.on_error = dict(tags or {}), on_error
        listed = loggers if isinstance(loggers, list | tuple) else [loggers]
        self._failures = Failures(on_error)
        self._recorder = Recorder(self.path, fsync, [as_logger(logger) for logger in listed], self._failures)
        self._turns = Turns(as_schedule(schedule), rank, self._recorder, self._failures)
        self._measuring = Measuring(options, batch, self._turns)
        self._sharing = SharedSteps(self._failures)

    def observe(
        self, step: int, model: Any, batch: Any = None, *, options: Mapping[str, Any] | None = None, **values: Any
    ) -> Decomposition | None:
        """Measure if the schedule says so. Call it before the update of this step, with the batch that it trains on.

        Parameters
        ----------
        step:
            Updates so far, an integer: 0 before the first one. A step is measured once; a smaller one than before says
            that the run went back, to a checkpoint for example.
        model, batch:
            As for `lnp.decompose`. The batch may be left out if the tracker has one.
        options:
            Options of `lnp.decompose` in the place of the tracker's, where they are known only with the batch.
        values:
            More numbers for the row, such as learning_rate=0.1.

        Returns
        -------
        Decomposition or None
            Of the training batch, or of the tracker's own without one. None where nothing was measured.
        """
        if options:
            check_options(options)
        return self._measure(step, model, batch, options, values) if self._turns.take(step, model) else None

    def measure(
        self, step: int, model: Any, batch: Any = None, *, options: Mapping[str, Any] | None = None, **values: Any
    ) -> Decomposition | None:
        """Measure at this step, whatever the schedule says, unless it has been measured. As `observe`."""
        if options:
            check_options(options)
        return self._measure(step, model, batch, options, values) if self._turns.take(step, model, False) else None

    def shared(self, step: int, model: Any, **values: Any) -> Shared:
        """Measure on the passes of the step itself, if the schedule says so: it then costs its probes alone.

            with tracker.shared(step, model) as shared:
                loss = criterion(model(inputs), targets)
            shared.backward(loss, targets, criterion)  # instead of loss.backward()

        Where nothing is due, and where watching fails before the step's own backward pass has run, the block runs as it
        is, and `backward` is the loss's own. For PyTorch's modules, see `lnp_torch.shared`; what the other backends'
        `value_and_grad` returns goes to `record`.

        Raises
        ------
        TypeError
            At the first call: for other models, and a tracker with batches or options that need passes of their own.
        """
        self._sharing.remind()
        self._sharing.check(model, self._measuring.options, own_batches=self._measuring.source is not None)
        if self._turns.take(step, model):
            step, attempt = operator.index(step), functools.partial(self.attempt, step)
            keep = lambda d, seconds: self._keep(self._measuring.row(step, d.to_dict(), seconds), d, values)
            with attempt():
                return self._sharing.watched(step, model, self._measuring.at(step), keep, attempt)
        return Shared()

    def record(self, step: int, decomposition: Decomposition, **values: Any) -> None:
        """Keep a decomposition of elsewhere (`lnp_jax.value_and_grad`), scheduled or not, unless the step has a row."""
        if self._turns.take_row(step):
            with self.attempt(step):
                row = self._measuring.row(operator.index(step), plain(decomposition.to_dict()), None)
                self._keep(row, decomposition, values)

    @contextlib.contextmanager
    def step(self, step: int, model: Any, batch: Any = None, **values: Any) -> Iterator[Watched]:
        """Measure before the update that the block makes, and what the update did to the loss after it.

            with tracker.step(step, model, batch):
                loss.backward()
                optimizer.step()

        The row gets "update/predicted" and "update/measured", the loss change of `lnp.step_taken`, for any optimizer.
        It is written after the block, and without them where the block raises an error, which passes through. A copy of
        the parameters is kept meanwhile, where a step is measured. In JAX, where an update makes new parameters, tell
        them: `with tracker.step(...) as watched: ...; watched.after(new_model)`.
        """
        watched, row = Watched(None, model), None
        if self._turns.take(step, model):
            with self.attempt(operator.index(step)):
                refuse(model)
                before = step_taken.snapshot(model)
                row, d = self._measuring.measured(operator.index(step), model, batch, {})
                watched.decomposition = d
        if row is None:
            yield watched
            return
        done = False
        try:
            yield watched
            done = True
            with self._failures.caught(row["step"], "update/predicted and update/measured in the row of this step"):
                row |= self._measuring.change(before, watched.model, batch)
        finally:
            with self._failures.caught(row["step"], ROWS, always=not done):
                self._keep(row, d, values, always=not done)

    def check(self, model: Any, reason: str | None = None) -> bool:
        """Whether nothing is known against measuring the model, such as sharded parameters; for before the run begins.

        `reason` is why it cannot be measured, where the caller knows that. The process that measures warns of it; with
        `on_error="raise"` every process raises a ValueError, so that none waits for another.
        """
        return self._turns.check(model, reason)

    def attempt(
        self, step: int | None, missing: str = ROWS, always: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Around what a loop does for a measurement alone: an error is told or raised, as `on_error` says.

            with tracker.attempt(step):
                tracker.observe(step, model, prepared(batch))

        `missing` is what the run goes on without. The step counts as observed, and the time as spent on measuring; None
        is for what is no step's measurement. `always` warns also where the tracker raises.
        """
        return self._turns.attempt(step, missing, always)

    def option(self, name: str) -> Any:
        """An option of `lnp.decompose` that the tracker was made with, or None."""
        return self._measuring.options.get(name)

    def due(self, step: int) -> bool:
        """Whether `observe` would measure at this step; for loops in which getting at the batch is work."""
        return self._turns.due(step)

    @property
    def schedule(self) -> Schedule:
        """When to measure."""
        return self._turns.schedule

    @property
    def latest(self) -> dict[str, float]:
        """The last measurement as loggers get it: {"lnp/chi_pos": 0.01, ...}."""
        return self._recorder.latest

    @property
    def history(self) -> History:
        """What has been measured, also by earlier processes."""
        return self._recorder.history

    def to_pandas(self, by_layer: bool = False) -> Any:
        """The history as a `pandas.DataFrame`."""
        return self.history.to_pandas(by_layer)

    def to_polars(self, by_layer: bool = False) -> Any:
        """The history as a `polars.DataFrame`."""
        return self.history.to_polars(by_layer)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: numbers and texts. The rows are part of it where there is no file to hold them."""
        keep = getattr(self.schedule, "state_dict", None)
        return {
            "version": VERSION,
            "observed": self._turns.observed,
            "schedule": keep() if callable(keep) else None,
            "batches": None if self._measuring.source is None else self._measuring.source.position,
            "rows": self.history.rows() if self.path is None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state, also with another schedule than the one it was made with.

        Raises
        ------
        ValueError
            For a state that this version does not know.
        """
        if state.get("version") != VERSION:
            raise ValueError(
                f"The state has version {state.get('version')!r}. Expected {VERSION}, as state_dict() writes it. "
                "Start with a new tracker; its file, if any, is continued."
            )
        restore = getattr(self.schedule, "load_state_dict", None)
        if callable(restore) and state["schedule"] is not None:
            with contextlib.suppress(KeyError):  # another schedule's state
                restore(state["schedule"])
        if self._measuring.source is not None and state["batches"] is not None:
            self._measuring.source.seek(state["batches"])
        if self.path is None and state["rows"] is not None:
            self._recorder.restore(state["rows"])
        self._turns.observed = state["observed"] - 1  # the step at which the checkpoint was made may come again

    def close(self) -> None:
        """Let others write to the file, and tell how often failures came again. Another `observe` opens it again."""
        self._close(failing=False)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._close(failing=kind is not None)

    def __repr__(self) -> str:
        return f"Tracker({self.path!r}, schedule={self.schedule!r}, {len(self.history)} rows)"

    def _close(self, failing: bool) -> None:
        """Close; where another error is on its way, without one of its own."""
        with self._failures.caught(None, "what the disk has lost of the file", always=failing):
            self._recorder.close()
        self._turns.close()
        if not failing:
            self._sharing.remind()
        self._failures.summary()

    def _measure(
        self, step: int, model: Any, batch: Any, options: Mapping[str, Any] | None, values: Mapping[str, Any]
    ) -> Decomposition | None:
        with self.attempt(step):
            row, d = self._measuring.measured(operator.index(step), model, batch, options or {})
            self._keep(row, d, values)
            return d
        return None

    def _keep(self, row: Mapping[str, Any], d: Decomposition, values: Mapping[str, Any], always: bool = False) -> None:
        self._recorder.keep({**row, **self.tags, **values}, d.notes, self.tags, always)
