"""Which steps of a run this process measures, and what becomes of the run where measuring one fails."""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lnp.arguments import Model
from lnp.schedule import Schedule
from lnp.tracking.failures import MISSING_ROW, Failures
from lnp.tracking.names import check_step
from lnp.tracking.process import has_others, needs_all, process_rank, refuse
from lnp.tracking.recorder import Recorder
from lnp.user_warnings import warn

NO_BUDGET = (
    "The schedule has a budget of time, which each process spends in its own way, and all processes measure this model "
    "together. Expected steps that all of them know. Use another schedule, such as lnp.schedule.log_windows()."
)
DEAR_SHARE, DEAR_SECONDS = 0.3, 60.0
"""Measuring is called dear once it has taken this share of a run's time, and this long."""
BEFORE_FIRST = -1
"""Stands for the last observed step where there is none yet."""


class StepSelection:
    """Tells a tracker whether this process is to measure a step. A step is measured once.

    Attributes
    ----------
    schedule:
        A function step -> bool, which may also have a `window` and a budget of time.
    observed:
        The last step that was observed.
    going_back:
        What is called with the step that a run has gone back to.
    together:
        Whether all processes are asked to measure, one of which keeps the rows.
    """

    def __init__(
        self, schedule: Schedule, rank: int | Callable[[], int] | None, recorder: Recorder, failures: Failures
    ) -> None:
        self.schedule = schedule
        self.observed = BEFORE_FIRST
        self._rank = rank
        self._recorder = recorder
        self.going_back: list[Callable[[int], None]] = [recorder.go_back]
        self._failures = failures
        self.together = False
        self._idle: bool | None = None  # whether another process measures; None until the first step
        self._others = False  # whether a framework computes with other processes as one
        self._unchecked = failures.on_error == "raise"
        self._first = BEFORE_FIRST
        self._began: int | None = None  # the first step of this process, until it came again
        self._spent: float | None = 0.0  # seconds of measuring, until they were told of
        self._started = 0.0
        self._tried: int | None = None  # the step at which opening the file was last tried

    def due(self, step: int) -> bool:
        """Whether this process would measure at this step."""
        if self._idle is None:
            self._start(step)
        return (self._others or not self._idle) and step != self.observed and self._is_scheduled(step)

    def claim(self, step: int, model: Model, scheduled: bool = True, alone: bool = False) -> bool:
        """Whether this process measures now: the step is a new one and, where it is `scheduled`, due; its row can be
        kept. `alone` says that one process measures unless others hold parts of the model.

        A model of which other processes hold parts is measured by all of them, whichever keeps the rows, and whether it
        can. Where failures raise, a model that is known to be refused raises at the first due step of every process: if
        the one that measures raised alone, the others would wait for it in their next collective.
        """
        if not self._is_new(step) or (self._idle and not self._unchecked and not self._others):
            return False
        if scheduled and not self._is_scheduled(step):
            return False
        if self._others and (needs_all(model) or (self.together and not alone)):
            if not self._can_agree(step):
                return False
            if not self._idle:
                self._open_recorder(step)
            return True
        if self._idle and not self._unchecked:
            return False
        if self._idle:
            self._unchecked = False
            refuse(model)
            return False
        return self._open_recorder(step)

    def takes_all(self, model: Model) -> bool:
        """Whether all processes measure the model: since they are asked to, or hold parts of it."""
        return self.together or needs_all(model)

    def claim_row(self, step: int) -> bool:
        """Whether this process keeps a row of this step that was measured elsewhere."""
        return self._is_new(step) and not self._idle and self._open_recorder(step)

    def check(self, model: Model, reason: str | None) -> bool:
        """Whether nothing is known against measuring the model; warned of, or raised in every process, otherwise."""
        if self._failures.on_error == "warn" and self._is_idle():
            return True
        with self._failures.catch(None, MISSING_ROW):
            if reason is not None or not self.takes_all(model):
                refuse(model, reason)
            return True
        return False

    @contextlib.contextmanager
    def attempt(self, step: int | None, missing: str, always: bool) -> Iterator[None]:
        """Around a measurement: one that fails is warned of or raised; it counts as observed, and has cost its time.
        Without a step, around something else.
        """
        started = time.perf_counter()
        with self._told(step, missing, always):
            try:
                yield
            except Exception:
                if step is not None:
                    self.observed = max(step, self.observed)
                    self.record_cost(time.perf_counter() - started)
                raise

    def _told(self, step: int | None, missing: str, always: bool) -> contextlib.AbstractContextManager:
        """Around what may fail; the process that keeps the rows tells of it, and hears of what fails in others."""
        if self._idle and self._failures.on_error == "warn":
            return contextlib.suppress(Exception)
        return self._failures.catch(step, missing, always)

    def record_cost(self, seconds: float) -> None:
        """Tell a schedule with a budget of time what measuring cost, and the user once where it is much of the run."""
        record = getattr(self.schedule, "measured", None)
        if callable(record):
            record(seconds)
        if self._spent is None:
            return
        self._spent += seconds
        if self._spent > DEAR_SECONDS and self._spent > DEAR_SHARE * (elapsed := time.perf_counter() - self._started):
            warn(
                f"lnp: measuring has taken {self._spent:.0f} of this run's {elapsed:.0f} seconds. To measure less "
                "often: schedule=lnp.schedule.budget(0.05), 5% of the time. To make a measurement cheaper: rtol=0.1 "
                "or max_probes=4, with larger errors of chi_net and chi_pos."
            )
            self._spent = None

    def window(self, step: int) -> int | None:
        """The centre of the window that a step is part of, in schedules of windows."""
        window = getattr(self.schedule, "window", None)
        return None if window is None else window(step)

    def state_dict(self) -> dict[str, Any]:
        """The last observed step, and what the schedule has to remember."""
        state = getattr(self.schedule, "state_dict", None)
        return {"observed": self.observed, "schedule": state() if callable(state) else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, also with another schedule."""
        restore = getattr(self.schedule, "load_state_dict", None)
        if callable(restore) and state["schedule"] is not None:
            with contextlib.suppress(KeyError):  # another schedule's state
                restore(state["schedule"])
        self._began = None
        self.observed = state["observed"] - 1  # the step at which the checkpoint was made may come again

    def close(self) -> None:
        """Begin anew at the next step."""
        self._idle = None

    def _can_agree(self, step: int) -> bool:
        """Whether all processes come to measure the same steps; told, or raised in all, where they do not."""
        agrees = not callable(getattr(self.schedule, "measured", None))
        if not agrees:
            with self._told(step, MISSING_ROW, False):
                raise ValueError(NO_BUDGET)
        return agrees

    def _start(self, step: int) -> None:
        """At the first step in this process: find out whether it is the one that measures, and continue its file."""
        check_step(step)
        self._spent, self._started = None if self._spent is None else 0.0, time.perf_counter()
        self._first = operator.index(step) + (step == self.observed)  # an observed step is not measured again
        self._began = operator.index(step)
        self._idle, self._others = self._is_idle(), has_others()
        if not self._idle:
            self._open_recorder(step)

    def _is_idle(self) -> bool:
        """Whether another process is the one that measures; where the rank cannot be found, yes."""
        rank: Any = True
        with self._failures.catch(None, "measurements in this process"):
            rank = process_rank() if self._rank is None else self._rank() if callable(self._rank) else self._rank
        return bool(rank)

    def _is_scheduled(self, step: int) -> bool:
        """Whether the schedule names the step; a schedule that fails names none."""
        try:
            return bool(self.schedule(step))
        except Exception:  # a `with` around the call would cost more than the call, at every step
            with self._failures.catch(step, MISSING_ROW):
                raise
            return False

    def _is_new(self, step: int) -> bool:
        """Whether the step was not observed yet. One before the last says that the run went back: what was measured
        from there on is void.
        """
        if self._idle is None:
            self._start(step)
        if step == self.observed:
            return False
        if step < self.observed:
            if step == self._began:
                self._tell_restart(step)
            self._first = min(self._first, step)
            for forget in self.going_back:
                forget(step)
        self.observed = step
        return True

    def _tell_restart(self, step: int) -> None:
        """Warn once where a run begins with its first step again, as one does that counts anew in each epoch."""
        self._began = None
        if not self._idle:
            warn(
                f"lnp: step {step} comes again after step {self.observed}, and what was measured so far is replaced, "
                "as after going back to a checkpoint. If steps count anew in each epoch, count on: step = epoch * "
                "len(loader) + i. For another run make another tracker, with a file of its own."
            )

    def _open_recorder(self, step: int) -> bool:
        """Whether rows can be kept; a file that cannot be opened is tried once more at each due step."""
        if not self._recorder.is_open and self._tried != step:
            with self._failures.catch(step, f"rows until {self._recorder.path} can be opened"):
                self._recorder.open(self._first)
            self._tried = step
        return self._recorder.is_open

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_idle": None, "_tried": None}  # another process finds out which one it is
