"""Watches a training run: measures at scheduled steps, and keeps what was measured."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Unpack

from lnp.arguments import Batch, Model
from lnp.loggers import LoggerSources, as_loggers
from lnp.results.decomposition import Decomposition
from lnp.results.step_taken import snapshot
from lnp.schedule import Schedule, ScheduleSource, as_schedule
from lnp.tracking.checkpoint import restore, state_of
from lnp.tracking.failures import MISSING_ROW, Failures, OnError
from lnp.tracking.history import Row
from lnp.tracking.kept_rows import KeptRows
from lnp.tracking.learning_rate import LearningRate
from lnp.tracking.measurement import ObservedStep, StepMeasurer, python_numbers
from lnp.tracking.options import check_call, check_made
from lnp.tracking.process import refuse
from lnp.tracking.recorder import Recorder
from lnp.tracking.shared_step import SharedStep, SharedSteps
from lnp.tracking.step_selection import StepSelection
from lnp.typed_options import DecomposeOptions


class Tracker(KeptRows):
    """Measures a run at scheduled steps. Nothing of the run is changed, not by a bit, and a failure never ends it.

    Call `observe` at every step, before the update. It answers in about a microsecond where nothing is due; otherwise
    it measures, adds a row to `history`, appends it to the file and hands it to the loggers.

    Parameters
    ----------
    path:
        The history's file (JSON Lines), or None to keep it in memory only. An existing file is continued: what the run
        measures again after going back to a checkpoint replaces what was there. One tracker writes to a file.
    schedule:
        When to measure: a number of steps, a list, a function step -> bool, or one of `lnp.schedule`. Default:
        `lnp.schedule.log_windows(width=3)`.
    batch:
        A batch to measure on instead of the training batch, or something to iterate over, such as a loader, which is
        gone through again and again. Where `observe` gets a training batch as well, the row holds also how fast the
        loss on `batch` falls while the run trains on its own, under "cross/..." and "measured/...". Under "net/..." is
        how fast the loss on it has really fallen since its last measurement.
    learning_rate:
        For the net rate: a number, a function step -> number, or an optimizer of PyTorch. Without, what `observe` gets.
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
        Options of `lnp.decompose`: loss, by_layer, rtol and others. The seed of a step's signs is `seed` plus the step.

    Raises
    ------
    TypeError
        For an option that `lnp.decompose` does not have, or a schedule or logger that is none.
    ValueError
        For the value of an option that cannot be, tags named as measured columns, a learning rate without a batch.

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
        schedule: ScheduleSource = None,
        *,
        batch: Batch | Iterable[Batch] = None,
        learning_rate: LearningRate = None,
        tags: Mapping[str, Any] | None = None,
        loggers: LoggerSources = (),
        rank: int | Callable[[], int] | None = None,
        fsync: bool = False,
        on_error: OnError = "warn",
        **options: Unpack[DecomposeOptions],
    ) -> None:
        check_made(path, schedule, tags, rank, options)
        self.path, self.tags, self.on_error = None if path is None else os.fspath(path), dict(tags or {}), on_error
        self._failures = Failures(on_error)
        self._recorder = Recorder(self.path, fsync, as_loggers(loggers), self._failures)
        self._selection = StepSelection(as_schedule(schedule), rank, self._recorder, self._failures)
        self._measurer = StepMeasurer(options, batch, learning_rate, self._selection)
        self._reads = self._measurer.net is not None and self._measurer.net.rates.reads
        self._shared_steps = SharedSteps(self._failures)

    def observe(
        self,
        step: int,
        model: Model,
        batch: Batch = None,
        *,
        options: Mapping[str, Any] | None = None,
        learning_rate: float | None = None,
        **values: Any,
    ) -> Decomposition | None:
        """Measure if the schedule says so. Call it before the update of this step, with the batch that it trains on.

        Parameters
        ----------
        step:
            Updates so far, an integer: 0 before the first one. A step is measured once; a smaller one than before says
            that the run went back, to a checkpoint for example.
        model, batch:
            What `lnp.decompose` takes: for most models a batch is (inputs, targets). It may be left out if the tracker
            has one.
        options:
            Options of `lnp.decompose` in the place of the tracker's, where they are known only with the batch.
        learning_rate:
            That of this step's update, for the net rate, which is per unit of its sum over all steps; also for the row.
        values:
            More numbers for the row, such as epoch=3, under names of no measured column.

        Returns
        -------
        Decomposition or None
            The training batch's, or that of the tracker's own batch without one. None where nothing was measured.
        """
        if options or values or not isinstance(learning_rate, float | None):  # in most steps nothing is due
            check_call(options, values, learning_rate)
        measured = None
        if self._selection.claim(step, model):
            given = values if learning_rate is None else {"learning_rate": learning_rate, **values}
            measured = self._measure(step, model, batch, options, given)
        if learning_rate is not None or self._reads:
            self.count(step, learning_rate)
        return measured

    def count(self, step: int, learning_rate: Any = None, reason: str = "") -> None:
        """The learning rate of this step's update, or an optimizer of PyTorch, where `observe` is called only if due.

        `reason` says why the update is none of gradient descent with it. Then there is a net rate, and no net position.
        """
        if self._measurer.net is not None:
            self._measurer.net.rates.add(step, learning_rate, reason)

    def measure(
        self, step: int, model: Model, batch: Batch = None, *, options: Mapping[str, Any] | None = None, **values: Any
    ) -> Decomposition | None:
        """Measure at this step, whatever the schedule says, unless it has been measured. As `observe`."""
        if options or values:
            check_call(options, values)
        claimed = self._selection.claim(step, model, False)
        measured = self._measure(step, model, batch, options, values) if claimed else None
        self.count(step, values.get("learning_rate"))
        return measured

    def shared(self, step: int, model: Model, **values: Any) -> SharedStep:
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
        check_call(None, values)
        self._shared_steps.remind()
        self._shared_steps.check(model, self._measurer.options, own_batches=self._measurer.source is not None)
        if not self._selection.claim(step, model):
            return SharedStep()
        index = operator.index(step)

        def keep(decomposition: Decomposition, seconds: float) -> None:
            self._keep(self._measurer.row(index, decomposition.to_dict(), seconds), decomposition, values)

        with self.attempt(index):
            return self._shared_steps.make(index, model, self._measurer.options_at(index), keep, self.attempt)
        return SharedStep()

    def record(self, step: int, decomposition: Decomposition, **values: Any) -> None:
        """Keep a decomposition of elsewhere (`lnp_jax.value_and_grad`), scheduled or not, unless the step has a row."""
        check_call(None, values)
        if self._selection.claim_row(step):
            with self.attempt(step):
                row = self._measurer.row(operator.index(step), python_numbers(decomposition.to_dict()), None)
                self._keep(row, decomposition, values)

    @contextmanager
    def step(self, step: int, model: Model, batch: Batch = None, **values: Any) -> Iterator[ObservedStep]:
        """Measure before the update that the block makes, and what the update did to the loss after it.

            with tracker.step(step, model, batch):
                loss.backward()
                optimizer.step()

        The row gets "update/predicted" and "update/measured", the loss change of `lnp.step_taken`, for any optimizer.
        It is written after the block, and without them where the block raises an error, which passes through. A copy of
        the parameters is kept meanwhile, where a step is measured. In JAX, where an update makes new parameters, tell
        them: `with tracker.step(...) as watched: ...; watched.after(new_model)`.
        """
        check_call(None, values)
        observed, row, done = ObservedStep(None, model), None, False
        if self._selection.claim(step, model, alone=True):
            with self.attempt(operator.index(step)):
                refuse(model)
                before = snapshot(model)
                row, decomposition = self._measurer.measure(operator.index(step), model, batch, {"group": None})
                observed.decomposition = decomposition
        self.count(step, values.get("learning_rate"))
        if row is None:
            yield observed
            return
        try:
            yield observed
            done = True
            with self._failures.catch(row["step"], "update/predicted and update/measured in the row of this step"):
                row |= self._measurer.loss_change(row["step"], before, observed, batch)
        finally:
            with self._failures.catch(row["step"], MISSING_ROW, always=not done):
                self._keep(row, decomposition, values, always=not done)

    def check(self, model: Model, reason: str | None = None) -> bool:
        """Whether nothing is known against measuring the model, such as sharded parameters; for before the run begins.

        `reason` is why it cannot be measured, where the caller knows that. The process that measures warns of it; with
        `on_error="raise"` every process raises a ValueError, so that none waits for another.
        """
        return self._selection.check(model, reason)

    def attempt(self, step: int | None, missing: str = MISSING_ROW, always: bool = False) -> AbstractContextManager:
        """Around what a loop does for a measurement alone: an error is warned of or raised, as `on_error` says.

            with tracker.attempt(step):
                tracker.observe(step, model, prepared(batch))

        `missing` is what the run goes on without. The step counts as observed, and the time as spent on measuring; None
        is for what is no step's measurement. `always` warns also where the tracker raises.
        """
        return self._selection.attempt(step, missing, always)

    def option(self, name: str) -> Any:
        """An option of `lnp.decompose` that the tracker was made with, or None."""
        return self._measurer.options.get(name)

    def due(self, step: int) -> bool:
        """Whether `observe` would measure at this step; for loops in which getting at the batch is work."""
        return self._selection.due(step)

    @property
    def schedule(self) -> Schedule:
        """When to measure."""
        return self._selection.schedule

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, of numbers and texts; with the rows where there is no file to hold them."""
        return state_of(self._selection, self._measurer, self._recorder)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state, also with another schedule than the one it was made with.

        Raises
        ------
        ValueError
            For a state that this version does not know.
        """
        restore(state, self._selection, self._measurer, self._recorder)

    def close(self) -> None:
        """Let others write to the file, and warn of how often failures came again. Another `observe` opens it again."""
        self._close(failing=False)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._close(failing=kind is not None)

    def __repr__(self) -> str:
        return f"Tracker({self.path!r}, schedule={self.schedule!r}, {len(self.history)} rows)"

    def _close(self, failing: bool) -> None:
        """Close; where another error is on its way, without one of its own."""
        with self._failures.catch(None, "what the disk has lost of the file", always=failing):
            self._recorder.close()
        self._selection.close()
        if not failing:
            self._shared_steps.remind()
        self._failures.report_repetitions()

    def _measure(
        self, step: int, model: Model, batch: Batch, options: Mapping[str, Any] | None, values: Row
    ) -> Decomposition | None:
        """The decomposition of a step, whose row is kept; None where measuring fails."""
        with self.attempt(step):
            row, decomposition = self._measurer.measure(operator.index(step), model, batch, options or {})
            self._keep(row, decomposition, values)
            return decomposition
        return None

    def _keep(self, row: Row, decomposition: Decomposition, values: Row, always: bool = False) -> None:
        """Hand a row to file, history and loggers, with the tags and the caller's values."""
        self._recorder.keep({**row, **self.tags, **values}, decomposition.notes, self.tags, always)
