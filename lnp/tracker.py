"""Watches a training run: measures at scheduled steps, and keeps what was measured."""

from __future__ import annotations

import contextlib
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lnp import sharing, sources, steps
from lnp.decomposition import Decomposition
from lnp.history import RESUMED, History
from lnp.loggers import Logger, as_logger, hand_on
from lnp.rows import Watched, check_options, measured, moved, numbers, plain, process_rank
from lnp.schedule import Schedule, as_schedule
from lnp.storage import Appender

VERSION = 1
"""Of the state that a checkpoint holds."""
ZERO = -1
"""Before the first step."""


class Tracker:
    """Measures a run at scheduled steps. Nothing of the run is changed, not by a bit.

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
    options:
        Of `lnp.decompose`: loss, by_layer, rtol and the others. The seed of the random signs is `seed` plus the step.

    Attributes
    ----------
    history:
        What has been measured, also by earlier processes.
    latest:
        The last measurement as loggers get it: {"lnp/chi_pos": 0.01, ...}.

    Raises
    ------
    TypeError
        For an option that `lnp.decompose` does not have, or a schedule or logger that is none.

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
        **options: Any,
    ) -> None:
        check_options(options)
        self.path = None if path is None else os.fspath(path)
        self.schedule: Schedule = as_schedule(schedule)
        self.tags = dict(tags or {})
        listed = loggers if isinstance(loggers, list | tuple) else [loggers]
        self._loggers: list[Logger] = [as_logger(logger) for logger in listed]
        self._rank, self._fsync = rank, fsync
        self._options = options
        self._source = None if batch is None else sources.source(batch)
        self._history: History | None = None
        self._file: Appender | None = None
        self._idle: bool | None = None
        self._observed = ZERO
        self._resumed: int | None = None
        self._notes: tuple[str, ...] = ()
        self.latest: dict[str, float] = {}

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
        if not self._reaches(step) or not self.schedule(step):
            return None
        return self._measure(operator.index(step), model, batch, options or {}, values)

    def measure(
        self, step: int, model: Any, batch: Any = None, *, options: Mapping[str, Any] | None = None, **values: Any
    ) -> Decomposition | None:
        """Measure at this step, whatever the schedule says, unless it has been measured. As `observe`."""
        if not self._reaches(step):
            return None
        return self._measure(operator.index(step), model, batch, options or {}, values)

    def shared(self, step: int, model: Any, **values: Any) -> sharing.Shared:
        """Measure on the passes of the step itself, if the schedule says so: it then costs its probes alone.

            with tracker.shared(step, model) as shared:
                loss = criterion(model(inputs), targets)
            shared.backward(loss, targets, criterion)  # instead of loss.backward()

        Where nothing is due the block runs as it is, and `backward` is the loss's own. For PyTorch's modules, see
        `lnp_torch.shared`; what the other backends' `value_and_grad` returns goes to `record`.

        Raises
        ------
        TypeError
            Where a step is due: for other models, and a tracker with batches or options that need passes of their own.
        """
        if not self._reaches(step) or not self.schedule(step):
            return sharing.Shared()
        keep = lambda d, seconds: self._record(self._row(operator.index(step), d, d.to_dict(), seconds, values))
        return sharing.watched(model, self._at(step), keep, own_batches=self._source is not None)

    def record(self, step: int, decomposition: Decomposition, **values: Any) -> None:
        """Keep a decomposition of elsewhere (`lnp_jax.value_and_grad`), scheduled or not, unless the step has a row."""
        if self._reaches(step):
            d = decomposition
            self._record(self._row(operator.index(step), d, plain(d.to_dict()), None, values))

    @contextlib.contextmanager
    def step(self, step: int, model: Any, batch: Any = None, **values: Any) -> Iterator[Watched]:
        """Measure before the update that the block makes, and what the update did to the loss after it.

            with tracker.step(step, model, batch):
                loss.backward()
                optimizer.step()

        The row gets "update/predicted" and "update/measured", the loss change of `lnp.step_taken`, for any optimizer.
        It is written after the block. A copy of the parameters is kept meanwhile, where a step is measured. In JAX,
        where an update makes new parameters, tell them: `with tracker.step(...) as watched: ...;
        watched.after(new_model)`.
        """
        watched = Watched(None, model)
        if not self._reaches(step) or not self.schedule(step):
            yield watched
            return
        before = steps.snapshot(model)
        row, watched.decomposition = self._measured(operator.index(step), model, batch, {}, values)
        try:
            yield watched
            own = batch if batch is not None else self._source.last if self._source is not None else None
            same = ("loss", "forward", "loss_terms", "batch_statistics")
            options = {name: self._options[name] for name in same if name in self._options}
            taken = steps.step_taken(before, watched.model, own, **options)
            row |= {"update/predicted": taken.predicted, "update/measured": taken.measured}
        finally:
            self._record(row)

    def option(self, name: str) -> Any:
        """An option of `lnp.decompose` that the tracker was made with, or None."""
        return self._options.get(name)

    def due(self, step: int) -> bool:
        """Whether `observe` would measure at this step; for loops in which getting at the batch is work."""
        if self._idle is None:
            self._start(step)
        return not self._idle and step != self._observed and self.schedule(step)

    @property
    def history(self) -> History:
        """What has been measured, also by earlier processes."""
        if self._history is None:
            known = self.path is not None and os.path.exists(self.path)
            return History.read(self.path) if known and self.path is not None else History()
        return self._history

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
            "observed": self._observed,
            "schedule": keep() if callable(keep) else None,
            "batches": None if self._source is None else self._source.position,
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
        if self._source is not None and state["batches"] is not None:
            self._source.seek(state["batches"])
        if self.path is None and state["rows"] is not None:
            self._history = History(state["rows"])
        self._observed = state["observed"] - 1  # the step at which the checkpoint was made may come again

    def close(self) -> None:
        """Let others write to the file. Another `observe` opens it again."""
        if self._file is not None:
            self._file.close()
        self._file, self._idle = None, None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Tracker({self.path!r}, schedule={self.schedule!r}, {len(self.history)} rows)"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_idle": None}  # a copy in another process opens the file itself

    def _reaches(self, step: int) -> bool:
        """Whether this process measures, and the step is a new one."""
        if self._idle is None:
            self._start(step)
        if step <= self._observed and not self._goes_back(step):
            return False
        self._observed = step
        return not self._idle

    def _start(self, step: int) -> None:
        """At the first step in this process: is it the one that measures, and does it continue a run?"""
        rank = process_rank() if self._rank is None else self._rank() if callable(self._rank) else self._rank
        if not rank and self.path is not None:
            self._file = Appender(self.path, self._fsync)
            self._history = History.read(self.path)
        elif self._history is None:
            self._history = History()
        last = self._history.last_step if self._history is not None else None
        if not rank and last is not None and step <= last:
            self._goes_back(step)
        self._idle = bool(rank)

    def _goes_back(self, step: int) -> bool:
        """Whether this step is before the last one; what was measured since is then void."""
        if step == self._observed:
            return False
        if self._history is not None:
            self._history.go_back(step)
        self._resumed = step if self._resumed is None else min(step, self._resumed)
        return True

    def _measure(self, *arguments: Any) -> Decomposition:
        row, d = self._measured(*arguments)
        self._record(row)
        return d

    def _measured(
        self, step: int, model: Any, batch: Any, own_options: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Decomposition]:
        started = time.perf_counter()
        options = {**self._at(step), **own_options}
        own = None if self._source is None else self._source.next(model)
        d, found = measured(step, model, batch, own, options)
        return self._row(step, d, found, time.perf_counter() - started, values), d

    def _at(self, step: int) -> dict[str, Any]:
        """The options of a step."""
        return {**self._options, "seed": moved(self._options.get("seed", 0), step)}

    def _row(
        self, step: int, d: Decomposition, found: Mapping[str, Any], seconds: float | None, values: Mapping[str, Any]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"step": step, "time": time.time(), **found}
        if d.notes != self._notes:
            self._notes, row["notes"] = d.notes, "; ".join(d.notes)
        window = getattr(self.schedule, "window", None)
        if window is not None and (centre := window(step)) is not None:
            row["window"] = centre
        if seconds is not None:
            row["seconds"] = seconds
            note = getattr(self.schedule, "measured", None)
            if callable(note):
                note(seconds)
        return {**row, **self.tags, **values}

    def _record(self, row: dict[str, Any]) -> None:
        if self._resumed is not None:
            row, self._resumed = row | {RESUMED: self._resumed}, None
        if self._file is not None:
            self._file.append(row)
        assert self._history is not None, "the first step has made it"
        self._history.append(row)
        self.latest = numbers(row, self.tags)
        hand_on(self._loggers, self.latest, row["step"])
