"""Which steps of a run this process measures, and what becomes of the run where measuring one fails."""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Callable, Iterator
from typing import Any

from lnp.contract import registry
from lnp.schedule import Schedule
from lnp.tracking.failures import ROWS, Failures
from lnp.tracking.recorder import Recorder
from lnp.tracking.rows import process_rank

ZERO = -1
"""Before the first step."""


class Turns:
    """Tells a tracker whether it is this process's turn to measure a step; each step has one turn.

    Attributes
    ----------
    schedule:
        A function step -> bool, which may also have a `window` and a budget of time.
    observed:
        The last step that was seen.
    """

    def __init__(
        self, schedule: Schedule, rank: int | Callable[[], int] | None, recorder: Recorder, failures: Failures
    ) -> None:
        self.schedule, self.observed = schedule, ZERO
        self._rank, self._recorder, self._failures = rank, recorder, failures
        self._idle: bool | None = None
        self._unchecked = failures.on_error == "raise"
        self._first = ZERO
        self._tried: int | None = None

    def due(self, step: int) -> bool:
        """Whether this process would measure at this step."""
        if self._idle is None:
            self._start(step)
        return not self._idle and step != self.observed and self._scheduled(step)

    def take(self, step: int, model: Any, scheduled: bool = True) -> bool:
        """Whether this process measures now: the step is a new one and, where it is `scheduled`, due; its row can be
        kept.

        Where failures raise, a model that is known to be refused raises at the first due step of every process: if the
        one that measures raised alone, the others would wait for it in their next collective.
        """
        if not self._reaches(step) or (self._idle and not self._unchecked) or (scheduled and not self._scheduled(step)):
            return False
        if self._idle:
            self._unchecked = False
            refuse(model)
            return False
        return self._opened(step)

    def take_row(self, step: int) -> bool:
        """Whether this process keeps a row of this step that was measured elsewhere."""
        return self._reaches(step) and not self._idle and self._opened(step)

    def check(self, model: Any, reason: str | None) -> bool:
        """Whether nothing is known against measuring the model; told, or raised in every process alike, otherwise."""
        if self._failures.on_error == "warn" and self._is_idle():
            return True
        with self._failures.caught(None, ROWS):
            refuse(model, reason)
            return True
        return False

    def _is_idle(self) -> bool:
        """Whether another process is the one that measures; where that cannot be told, yes."""
        rank: Any = True
        with self._failures.caught(None, "measurements in this process"):
            rank = process_rank() if self._rank is None else self._rank() if callable(self._rank) else self._rank
        return bool(rank)

    @contextlib.contextmanager
    def attempt(self, step: int | None, missing: str, always: bool) -> Iterator[None]:
        """Around a measurement: one that fails is told or raised, has had its turn, and has cost its time. Without a
        step, around something else.
        """
        started = time.perf_counter()
        with self._failures.caught(step, missing, always):
            try:
                yield
            except Exception:
                if step is not None:
                    self.observed = max(step, self.observed)
                    self.spent(time.perf_counter() - started)
                raise

    def spent(self, seconds: float) -> None:
        """Tell a schedule with a budget of time what measuring cost."""
        note = getattr(self.schedule, "measured", None)
        if callable(note):
            note(seconds)

    def window(self, step: int) -> int | None:
        """The centre of the window that a step is part of, in schedules of windows."""
        window = getattr(self.schedule, "window", None)
        return None if window is None else window(step)

    def close(self) -> None:
        """Begin anew at the next step."""
        self._idle = None

    def _scheduled(self, step: int) -> bool:
        try:
            return bool(self.schedule(step))
        except Exception:  # a `with` around the call would cost more than the call, at every step
            with self._failures.caught(step, ROWS):
                raise
            return False

    def _reaches(self, step: int) -> bool:
        """Whether the step is a new one."""
        if self._idle is None:
            self._start(step)
        if step <= self.observed and not self._goes_back(step):
            return False
        self.observed = step
        return True

    def _start(self, step: int) -> None:
        """At the first step in this process: is it the one that measures, and does it continue a run?"""
        self._first = operator.index(step) + (step == self.observed)  # what was observed is not measured again
        self._idle = self._is_idle()
        if not self._idle:
            self._opened(step)

    def _opened(self, step: int) -> bool:
        """Whether rows can be kept; a file that cannot be opened is tried once more at each due step."""
        if not self._recorder.is_open and self._tried != step:
            with self._failures.caught(step, f"rows until {self._recorder.path} can be opened"):
                self._recorder.open(self._first)
            self._tried = step
        return self._recorder.is_open

    def _goes_back(self, step: int) -> bool:
        """Whether this step is before the last one; what was measured since is then void."""
        if step == self.observed:
            return False
        self._first = min(self._first, step)
        self._recorder.go_back(step)
        return True

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_idle": None, "_tried": None}  # another process finds out which one it is


def alone(model: Any) -> contextlib.AbstractContextManager:
    """Around a measurement that the other processes of a run do not make: what would wait for them raises an error."""
    return getattr(registry.find(model), "alone", contextlib.nullcontext)()


def refuse(model: Any, reason: str | None = None) -> None:
    """Refuse a model of which its backend, or the caller, knows that it cannot be measured; nothing is touched.

    Raises
    ------
    ValueError
        With the backend's reason, or the caller's.
    TypeError
        For a model that no backend accepts.
    """
    if reason is None:
        backend = registry.find(model)
        reason = backend.refusal(model) if hasattr(backend, "refusal") else None
    if reason is not None:
        raise ValueError(reason)
