r"""Spectral reach: how far into the spectral tail a run gets, and how that scales with the size of the model.

    reach = min over windows of the mean of chi_pos in the window

The lowest position that a run attains, smoothed over a window of measurements. The lowest of many noisy means is low by
luck, the more so the more windows there are. So one half of the measurements (every second one) chooses the window and
the other half is averaged in it, which is unbiased whatever was chosen; then the halves change places, and the reach is
the mean of both. What it estimates is the mean of the true position over the measurements that were averaged. Or the
window is fixed beforehand: the last one. Derived in docs/theory.md, "Reach is a minimum of noisy numbers".

Source: Nikolaou, Scheunemann, Krippendorf, Tovey, Holm, "Spectral Reach", arXiv 2605.31244.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, TypeAlias

import numpy as np

from lnp.results.rounding import with_error

Numbers: TypeAlias = "Sequence[float] | np.ndarray"
RESOLVED = 2.0
"""Standard errors that a position has to be above zero to be given as a value."""
CORRELATION = 0.36
"""The most that the two halves' errors correlate: of three windows that are equally low."""
STRETCH = 15
"""Measurements at least whose spread is held against their errors."""
SHARED = 0.1
"""Below this part of the variance that their errors say, the spread of measurements shows that they are of the same
samples: their errors are one error then, which no mean makes smaller.
"""


@dataclass(frozen=True)
class Reach:
    """The lowest smoothed position of a run, or the mean over repeated runs.

    Attributes
    ----------
    chi_pos:
        The reach, unbiased; below zero only within the error, where population positions came in.
    stderr:
        Its standard error. nan where nothing tells.
    step:
        Where it was attained: geometric mean of the steps in the window (mean over halves and runs likewise).
    window:
        Measurements in a window, or windows of the schedule.
    runs:
        Runs that were averaged.
    """

    chi_pos: float
    stderr: float
    step: float
    window: int
    runs: int = 1

    @property
    def resolved(self) -> bool:
        """Whether the reach is a value: not closer to zero than two standard errors."""
        return not self.chi_pos < RESOLVED * self.stderr

    @property
    def limit(self) -> float:
        """An upper limit where the reach is no value: two standard errors above it, or above zero; else nan."""
        return math.nan if self.resolved else max(self.chi_pos, 0.0) + RESOLVED * self.stderr

    def __str__(self) -> str:
        if not self.resolved:
            return f"below {self.limit:.2g}"
        return with_error(self.chi_pos, self.stderr) if self.stderr > 0 else f"{self.chi_pos:.3g}"


def reach(
    steps: Numbers,
    positions: Numbers | None = None,
    stderrs: Numbers | None = None,
    *,
    window: int | Literal["last"] = 5,
    size: int = 5,
    groups: Numbers | None = None,
) -> Reach:
    r"""The spectral reach of one run.

    Late in training pass the population's positions: a small batch's own are its sampling noise (docs/theory.md,
    "Finite batches"). Measurements count as independent, unless they scatter so much less than their errors say that
    they must be of the same samples: a mean over them has the error of one then.

    Parameters
    ----------
    steps, positions:
        The steps that were measured, rising, and chi_pos there, or `Decomposition.population.chi_pos`. Measurements
        that are nan are left out.
    stderrs:
        Standard errors of the positions. They are raised by the factor by which second differences of neighbouring
        positions exceed what they say, if they do. Without them, or where one is zero or nan, those differences give
        the error.
    window:
        Neighbouring measurements to average, of which one half chooses the window and the other half is averaged: 2 or
        more, at most all. Or "last", for the last `size` measurements and no choice.
    size:
        Measurements in the last window.
    groups:
        A number for each measurement, equal for those that one window of the schedule holds (`history["window"]`):
        these windows are then what `window` and `size` count.

    Raises
    ------
    TypeError
        Without positions.
    ValueError
        For lists of different lengths, steps that do not rise, and a window that does not fit.

    Examples
    --------
    >>> found = reach([1, 10, 100, 1000], [0.4, 0.2, 0.1, 0.2], [0.01] * 4, window="last", size=2)
    >>> round(found.chi_pos, 9), round(found.step, 6)
    (0.15, 316.227766)
    >>> print(reach(range(8), [4, 2, 0.3, -0.2, 0.1, -0.3, 0.2, 0.1], [0.3] * 8, window=4))
    below 0.38
    """
    if positions is None:
        raise TypeError(
            f"reach received one argument, a {type(steps).__name__}. Expected the steps and the positions there. A "
            "history has its own: history.reach(), or lnp.History.read(path).reach()."
        )
    x, y = np.asarray(steps, dtype=float), np.asarray(positions, dtype=float)
    e = np.full_like(y, np.nan) if stderrs is None else np.asarray(stderrs, dtype=float)
    labels = np.arange(y.size, dtype=float) if groups is None else np.asarray(groups, dtype=float)
    if not (x.ndim == 1 and x.shape == y.shape == e.shape == labels.shape):
        raise ValueError(f"Received shapes {x.shape}, {y.shape}, {e.shape}. Expected one position for each step.")
    if np.any(np.diff(x) <= 0):
        raise ValueError("The steps do not rise. Expected one run, in order; use reach_of_runs for several.")
    width = size if window == "last" else window
    count = int(np.count_nonzero(np.diff(labels))) + 1 if y.size else 0
    if not (isinstance(width, Integral) and 1 <= width <= count):
        raise ValueError(
            f"window is {width!r} for {count} measurements. Expected between 1 and all of them, or 'last'."
        )
    known = np.isfinite(y)
    x, y, e, labels = x[known], y[known], e[known], labels[known]
    if not y.size:
        return Reach(math.nan, math.nan, math.nan, int(width))
    begin = np.flatnonzero(np.r_[True, np.diff(labels) != 0])
    edges = np.r_[begin, y.size]
    width = min(int(width), begin.size)
    starts, stops = edges[: begin.size - width + 1], edges[width:]
    if window == "last" or starts.size == 1:
        chosen = np.arange(starts[-1], stops[-1])
        stderr = math.hypot(*_stderr(y, e, chosen))
        return Reach(float(np.mean(y[chosen])), stderr, _middle(x[chosen]), width)
    return _crossed(x, y, e, starts, stops, width)


def reach_of_runs(runs: Sequence[Reach]) -> Reach:
    """The mean reach of runs that differ in their seed.

        reach = sum_r reach_r / R,   step = (prod_r step_r)^(1/R)

    Its standard error is the larger of what the spread over runs gives, std / sqrt(R), and of what their own errors
    give, sqrt(sum SE^2) / R: of few runs the spread may come out small by luck.

    Raises
    ------
    ValueError
        For no run, and for different windows.

    Examples
    --------
    >>> mean = reach_of_runs([Reach(0.1, 0.01, 10.0, 5), Reach(0.3, 0.01, 1000.0, 5)])
    >>> round(mean.chi_pos, 9), round(mean.stderr, 9), round(mean.step, 6), mean.runs
    (0.2, 0.1, 100.0, 2)
    """
    windows = {run.window for run in runs}
    if len(windows) != 1:
        raise ValueError(f"Received {len(runs)} runs with windows {sorted(windows)}. Expected runs of one window.")
    values = np.array([run.chi_pos for run in runs])
    propagated = float(np.sqrt(np.sum([run.stderr**2 for run in runs]))) / values.size
    spread = float(np.std(values, ddof=1)) / math.sqrt(values.size) if values.size > 1 else propagated
    stderr = spread if math.isnan(propagated) else max(propagated, spread)
    return Reach(
        float(np.mean(values)), stderr, _middle(np.array([run.step for run in runs])), windows.pop(), values.size
    )


def _crossed(
    x: np.ndarray, y: np.ndarray, e: np.ndarray, starts: np.ndarray, stops: np.ndarray, width: int
) -> Reach:  # fmt: skip
    """The mean of the two estimates in which one half of the measurements chooses the window, the other is averaged.

    Each is unbiased, for the halves' errors are independent. Together they are not: where both halves choose one
    window, both are low by luck. Their correlation is nowhere negative, and 0.36 at most.
    """
    halves = np.arange(y.size) % 2
    enough = stops - starts > 1
    if not enough.any():
        raise ValueError(
            "window is 1: a single measurement cannot both choose the window and be averaged in it. Expected 2 or "
            "more, or window='last'."
        )
    starts, stops = starts[enough], stops[enough]
    chosen = []
    for half in (0, 1):
        own = halves == half
        sums, counts = (np.r_[0.0, np.cumsum(values * own)] for values in (y, np.ones_like(y)))
        lowest = int(np.argmin((sums[stops] - sums[starts]) / (counts[stops] - counts[starts])))
        inside = np.arange(starts[lowest], stops[lowest])
        chosen.append(inside[halves[inside] != half])
    (one, shared), (other, also_shared) = (_stderr(y, e, rows) for rows in chosen)
    own = math.sqrt(one**2 + other**2 + 2 * CORRELATION * one * other) / 2
    stderr = math.hypot(own, (shared + also_shared) / 2)
    middle = _middle(np.array([_middle(x[rows]) for rows in chosen]))
    return Reach(float(np.mean([np.mean(y[rows]) for rows in chosen])), stderr, middle, width)


def _stderr(y: np.ndarray, e: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Standard error of the mean of some measurements: from their errors, raised by what the spread around them says;
    and the error that they share, where the spread says that they are of the same samples.

    Second differences of neighbours, (y_0 - 2 y_1 + y_2)^2 / 6, tell the variance of one of them whatever its trend.
    """
    start, stop = int(rows[0]), int(rows[-1]) + 1
    around = max(stop - start, -(-(STRETCH - (stop - start)) // 2))
    near = slice(max(0, start - around), stop + around)
    square = _second_differences(y[near], np.array([1.0, -2.0, 1.0]))
    if np.all(e[near] > 0):
        said = _second_differences(e[near] ** 2, np.array([1.0, 4.0, 1.0]))
        excess = float(np.mean(square**2 / said)) if square.size else 1.0
        if excess < SHARED:
            return math.sqrt(excess * float(np.sum(e[rows] ** 2))) / rows.size, float(np.mean(e[rows]))
        return math.sqrt(max(1.0, excess) * float(np.sum(e[rows] ** 2))) / rows.size, 0.0
    if square.size:
        return math.sqrt(float(np.mean(square**2)) / 6 / rows.size), 0.0
    return float(np.std(y[near], ddof=1)) / math.sqrt(rows.size) if y[near].size > 1 else math.nan, 0.0


def _second_differences(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of three neighbours, (n - 2,)."""
    return np.correlate(values, weights, "valid") if values.size > 2 else values[:0]


def _middle(steps: np.ndarray) -> float:
    """Geometric mean; arithmetic where step 0 is among them."""
    return float(np.exp(np.mean(np.log(steps)))) if np.all(steps > 0) else float(np.mean(steps))
