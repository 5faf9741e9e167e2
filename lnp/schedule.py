"""When to measure: rules that say of a step whether it is one.

A schedule is a function step -> bool; any predicate is one. Those here decide in about a microsecond, so that they can
be asked at every step of a training loop. Steps count from 0, the state before the first update.

A schedule may have more: `window(step)`, the number by which measurements are averaged together; `measured(seconds)`,
called after each measurement with what it cost; `state_dict()` and `load_state_dict(state)`, what it has to remember
when a run is resumed.
"""

from __future__ import annotations

import math
import operator
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

Schedule = Callable[[int], bool]
ScheduleSource = Schedule | int | Collection[int] | None
"""A schedule, a number of steps, a list or array of steps, or None for `log_windows(width=3)`."""
WIDTH = 3
"""Steps in a window of the default schedule: the fewest whose spread is an error bar that says something."""


@dataclass(frozen=True)
class every:
    """Every k steps, 0 included.

    Raises
    ------
    ValueError
        If k is not an integer >= 1.

    Examples
    --------
    >>> [step for step in range(25) if every(10)(step)]
    [0, 10, 20]
    """

    k: int

    def __post_init__(self) -> None:
        if not (isinstance(self.k, Integral) and self.k >= 1):
            raise ValueError(f"every({self.k!r}) was asked for. Expected a number of steps >= 1.")

    def __call__(self, step: int) -> bool:
        return step % self.k == 0


class at:
    """At the listed steps.

    Raises
    ------
    TypeError
        For steps that are not integers.

    Examples
    --------
    >>> [step for step in range(25) if at([0, 3, 20])(step)]
    [0, 3, 20]
    """

    def __init__(self, steps: Iterable[int]) -> None:
        steps = list(steps)
        try:
            self.steps = frozenset(operator.index(step) for step in steps)
        except TypeError:
            raise TypeError(f"at({steps!r}) was asked for. Expected integers, the steps to measure at.") from None

    def __call__(self, step: int) -> bool:
        return step in self.steps

    def __repr__(self) -> str:
        return f"at({sorted(self.steps)})"


@dataclass
class log_windows:
    r"""Windows of consecutive steps around points that are evenly spaced in the logarithm of the step.

        centres   c_i = round(10^(i / points_per_decade)),  i = 0, 1, ..., and 0
        widths    w_i = round(width (1 + growth log10 c_i)),  w = width at step 0

    A window is centred on its point as nearly as integers allow, and cut off at step 0 and at `last`, never dropped:
    with `last` given, a window at the very end is among them. Windows that overlap share their steps; a step belongs to
    the nearest centre.

    Parameters
    ----------
    points_per_decade:
        Windows for each factor of ten in the step.
    width:
        Measured steps in a window; averaging over them gives the figures their error bands.
    growth:
        How much wider windows get with each factor of ten, relative to `width`.
    last:
        The last step of the run, if it is known.

    Raises
    ------
    ValueError
        For a density that is not positive, a width below 1, or a negative growth or last step.

    Examples
    --------
    >>> [step for step in range(101) if log_windows(2, last=100)(step)]
    [0, 1, 3, 10, 32, 100]
    >>> [step for step in range(101) if log_windows(1, width=3, growth=0.5, last=100)(step)]
    [0, 1, 2, 9, 10, 11, 12, 98, 99, 100]
    """

    points_per_decade: float = 8.0
    width: int = 1
    growth: float = 0.0
    last: int | None = None
    _centres: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _points: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.points_per_decade > 0:
            raise ValueError(f"points_per_decade is {self.points_per_decade!r}. Expected a positive number, such as 8.")
        if not (isinstance(self.width, Integral) and self.width >= 1 and self.growth >= 0):
            raise ValueError(
                f"width is {self.width!r} and growth {self.growth!r}. Expected a number of steps >= 1 and a growth >= "
                "0."
            )
        if self.last is not None and not (isinstance(self.last, Integral) and self.last >= 0):
            raise ValueError(f"last is {self.last!r}. Expected the last step of the run, or None.")
        self._centres = [0]

    def __call__(self, step: int) -> bool:
        return self.window(step) is not None

    def window(self, step: int) -> int | None:
        """The centre of the window that the step is in, or None."""
        if step < 0 or (self.last is not None and step > self.last):
            return None
        # the next centre but one is needed: windows reach to the left
        while len(self._centres) < 3 or self._centres[-2] <= step:
            if not self._extend():
                break
        right = bisect_right(self._centres, step)
        # the windows of nearer centres reach nearer, but for the one at 0, which is not centred
        near = (*self._centres[max(0, right - 1) : right + 1], 0)
        inside = [centre for centre in near if self._first(centre) <= step <= self._last(centre)]
        return min(inside, key=lambda centre: abs(centre - step)) if inside else None

    def _extend(self) -> bool:
        """Add the next centre; False where the run ends."""
        if self._centres[-1] == self.last:
            return False
        centre = self._centres[-1]
        while centre == self._centres[-1]:
            centre = round(10 ** (self._points / self.points_per_decade))
            self._points += 1
        self._centres.append(centre if self.last is None else min(centre, self.last))
        return True

    def _width(self, centre: int) -> int:
        return round(self.width * (1 + self.growth * math.log10(max(centre, 1))))

    def _first(self, centre: int) -> int:
        return centre - (self._width(centre) - 1) // 2 if centre else 0

    def _last(self, centre: int) -> int:
        return centre + self._width(centre) // 2 if centre else self.width - 1


class budget:
    """As often as measuring takes at most a fraction of the run's time.

    A measurement is due when, with what it will probably cost, all measurements together stay below `fraction` of the
    time since the first step. The cost is learnt from the last ones, so that the schedule adapts to the model and to a
    machine that gets slower. The first measurement, which compiles and warms up, is not counted; the second follows at
    once, and tells what one costs: its time the run has to earn before the third.

    Parameters
    ----------
    fraction:
        Fraction of the wall-clock time, in (0, 1).
    among:
        A schedule, in any of the forms that `lnp.Tracker` takes; only its steps are considered.
    clock:
        Seconds, for tests.

    Raises
    ------
    ValueError
        For a fraction outside (0, 1).
    TypeError
        For an `among` that is no schedule.

    Examples
    --------
    >>> seconds = iter(range(1000))  # each look at the clock is a second later
    >>> schedule = budget(0.25, clock=lambda: next(seconds))
    >>> due = []
    >>> for step in range(14):
    ...     if schedule(step):
    ...         schedule.measured(1.0)
    ...         due.append(step)
    >>> due
    [0, 1, 9, 13]
    """

    def __init__(
        self, fraction: float, among: ScheduleSource = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if not 0 < fraction < 1:
            raise ValueError(
                f"budget({fraction!r}) was asked for. Expected a fraction of the run's time, such as 0.02."
            )
        self.fraction = fraction
        self.among: Schedule | None = None if among is None else as_schedule(among)
        self._clock = clock
        self._start: float | None = None
        self._spent = 0.0
        self._cost: float | None = None
        self._is_warm = False  # in this process: a loaded state does not make it so

    def __call__(self, step: int) -> bool:
        if self._start is None:
            self._start = self._clock()
        if self.among is not None and not self.among(step):
            return False
        if self._cost is None:
            return True
        return self._spent + self._cost <= self.fraction * (self._clock() - self._start)

    def window(self, step: int) -> int | None:
        """The window of the schedule that it chooses among."""
        inner = getattr(self.among, "window", None)
        return None if inner is None else inner(step)

    def measured(self, seconds: float) -> None:
        """Take note of what a measurement cost."""
        if not self._is_warm:  # the first one says nothing about the others
            self._is_warm = True
            return
        self._spent += seconds
        self._cost = seconds if self._cost is None else 0.5 * (self._cost + seconds)

    def state_dict(self) -> dict[str, Any]:
        """Seconds so far and spent, and the cost of one measurement."""
        elapsed = 0.0 if self._start is None else self._clock() - self._start
        return {"elapsed": elapsed, "spent": self._spent, "cost": self._cost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._start = self._clock() - state["elapsed"]
        self._spent = state["spent"]
        self._cost = state["cost"]

    def __repr__(self) -> str:
        return f"budget({self.fraction}" + (")" if self.among is None else f", among={self.among!r})")


def as_schedule(given: ScheduleSource) -> Schedule:
    """A schedule from what users write: a number of steps, a list of steps, a predicate, None for windows of three
    steps, `log_windows(width=3)`.

    Raises
    ------
    TypeError
        For anything else.
    """
    if given is None:
        return log_windows(width=WIDTH)
    if isinstance(given, type):
        raise TypeError(
            f"The schedule is the class {given.__name__}. Expected a schedule: call it, as in lnp.schedule.every(10) "
            "or lnp.schedule.log_windows()."
        )
    if callable(given):
        return given
    if isinstance(given, Integral) and not isinstance(given, bool):
        return every(int(given))
    if hasattr(given, "tolist") and getattr(given, "ndim", 0) == 1:
        return at(given.tolist())
    if isinstance(given, list | tuple | set | frozenset | range):
        return at(given)
    raise TypeError(
        f"The schedule is of type {type(given).__name__}. Expected a number of steps, a list of steps, a function "
        "step -> bool, or one of lnp.schedule: every, at, log_windows, budget."
    )
