"""What a run's history says: averages over windows, spectral reach, and where each factor stalls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lnp.runs import spectral_reach
from lnp.runs.spectral_reach import Reach
from lnp.tracking.history import History

MOST_POINTS = 400
"""Points of a curve; a history with more is averaged over stretches that are even in the logarithm of the step."""
SMOOTHED = 3
"""Points that are averaged in curves against each other, and before it is asked where a factor stalls."""
STALLED = 1.25
"""A factor has stalled once it stays within this factor of where it ends."""
STALLED_SPAN = 1.5
"""What is left of the run then has to be at least this factor in steps."""
FACTORS = ("chi_loss", "chi_net", "chi_pos")
POSITION = "population/chi_pos"
NET_POSITION = "net/chi_pos"
NOISE_SCALE = "population/noise_scale"
GRADIENT_NOISE = "population/gradient_noise"


@dataclass(frozen=True)
class Curve:
    """A quantity along a run, averaged over windows: (points,) each.

    Attributes
    ----------
    step:
        The middle of each window.
    mean, stderr:
        Mean of the window's measurements and its standard error; the error of a single measurement is its own, nan
        where it has none.
    first, last:
        The window's first and last step.
    low, high:
        One standard error to each side; of the noise scale, whose interval is none of equal sides, that of its
        reciprocal. Where its mean is inf, `low` is a lower limit at two standard errors.
    """

    step: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray
    first: np.ndarray
    last: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Summary:
    """A run in numbers.

    Attributes
    ----------
    rows, last_step:
        Measurements, and the step of the last one.
    parameters:
        Trained parameters, nan if the history does not say.
    first_loss, loss:
        The loss in the first and the last window.
    reach:
        The spectral reach, of the population's positions where they are known, else of the batch's.
    stalled:
        {factor: the step from which on it stays within a factor 1.25 of where it ends}; nan for one that still moves.
    """

    rows: int
    last_step: int
    parameters: float
    first_loss: float
    loss: float
    reach: Reach
    stalled: Mapping[str, float]


def curve(history: History, column: str) -> Curve:
    """A column averaged over the windows of the schedule. Rows in which it is nan are left out.

    The error of a mean comes from the spread of its rows. Where rows are of the same samples, as on a tracker's own
    batch, their spread does not show the error of the samples, and that of a single row is added: where the spread of
    most windows is far below what the rows' own errors say, and always for net rates and positions.

    The noise scale is a ratio, of which numerator and denominator are averaged: tr Cov and ||grad L||^2. It is infinite
    where the mean of the latter is within two standard errors of zero, and `low` is what it is above.
    """
    if column == NOISE_SCALE:
        return _noise_scale(history)
    values = history.numbers(column)
    windows = _windows(history, values)
    error = windows.error(values, history.numbers(f"{column}_stderr"), shared=column.startswith("net/"))
    mean = windows.mean(values)
    with np.errstate(invalid="ignore"):  # of infinities
        return Curve(windows.middle, mean, error, *windows.ends, mean - error, mean + error)


def _noise_scale(history: History) -> Curve:
    """The noise scale tr Cov / ||grad L||^2 as a ratio of means, with the interval of what is not noise.

    With R = ||grad L||^2 the share u = R / (R + tr Cov) has a denominator that is known well, and the noise scale is
    1/u - 1. Where u is within two standard errors of zero all that is known is what the noise scale is above, `low`.
    """
    rate = history.get("population/rate").astype(np.float64)
    noise = history.get(GRADIENT_NOISE).astype(np.float64)
    with np.errstate(invalid="ignore"):  # of files from before there was the column
        noise = np.where(np.isnan(noise), history.get(NOISE_SCALE).astype(np.float64) * rate, noise)
    windows = _windows(history, noise)
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = rate + noise
        share = windows.mean(rate) / windows.mean(whole)
        residual = rate - windows.at_rows(share, len(rate)) * whole
        scatter = windows.error(residual, history.get("population/rate_stderr"))
        error = np.nan_to_num(scatter / windows.mean(whole))
        low, high = (_inverted(share + side * error) for side in (1, -1))
        unresolved = share <= spectral_reach.RESOLVED * error
        low = np.where(unresolved, _inverted(np.maximum(share, 0) + spectral_reach.RESOLVED * error), low)
        mean = np.where(unresolved, np.inf, _inverted(share))
        return Curve(windows.middle, mean, (high - low) / 2, *windows.ends, low, high)


def _inverted(share: np.ndarray) -> np.ndarray:
    """The noise scale 1/u - 1 of a share u; inf where u is not above zero."""
    return np.where(share > 0, np.maximum(1 / share - 1, 0.0), np.inf)


@dataclass(frozen=True)
class _Windows:
    """The rows in which a quantity has a value, their steps, and where among them each window begins."""

    rows: np.ndarray
    start: np.ndarray
    step: np.ndarray

    @property
    def size(self) -> np.ndarray:
        return np.diff(np.r_[self.start, len(self.rows)])

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        return self.step[self.start], self.step[self.start + self.size - 1]

    @property
    def middle(self) -> np.ndarray:
        return (self.ends[0] + self.ends[1]) / 2

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean of each window, shape (windows,), of values in all rows."""
        return self._mean_of_rows(values[self.rows])

    def error(self, values: np.ndarray, stderr: np.ndarray, shared: bool = False) -> np.ndarray:
        """Standard error of each window's mean, from its spread; of a single row its own `stderr`. Where that is
        `shared` by a window's rows, or seen to be, the mean has it as well.
        """
        with np.errstate(invalid="ignore"):  # of infinities
            deviation = values[self.rows] - np.repeat(self.mean(values), self.size)
            spread = np.sqrt(self._mean_of_rows(deviation**2) / np.maximum(self.size - 1, 1))
            own = np.nan_to_num(self.mean(stderr))
            shared = shared or self._is_shared(spread, own)
        return np.where(self.size > 1, np.hypot(spread, own) if shared else spread, self.first_of(stderr))

    def _is_shared(self, spread: np.ndarray, own: np.ndarray) -> bool:
        """Whether rows scatter so much less than their own errors say that they must be of the same samples: in the
        median over windows, since a window of three rows may do so by chance.
        """
        told = (self.size > 1) & (own > 0) & np.isfinite(spread)
        ratio = self.size[told] * (spread[told] / own[told]) ** 2
        return len(ratio) > 0 and float(np.median(ratio)) < spectral_reach.SHARED

    def first_of(self, values: np.ndarray) -> np.ndarray:
        """The value of each window's first row."""
        return values[self.rows][self.start].astype(np.float64)

    def at_rows(self, of_windows: np.ndarray, rows: int) -> np.ndarray:
        """A value of each window at each of its rows, nan in the others, shape (rows,)."""
        values = np.full(rows, np.nan)
        values[self.rows] = np.repeat(of_windows, self.size)
        return values

    def _mean_of_rows(self, values: np.ndarray) -> np.ndarray:
        """The mean of each window of values in the windows' rows."""
        if not len(self.rows):
            return np.empty(0)
        return np.add.reduceat(values.astype(np.float64), self.start) / self.size


def _windows(history: History, values: np.ndarray) -> _Windows:
    """The windows of the rows in which the values are not nan."""
    rows = np.flatnonzero(~np.isnan(values))
    if not len(rows):
        return _Windows(rows, rows, np.empty(0))
    step = history["step"][rows]
    group = _groups(step, history.get("window")[rows])
    return _Windows(rows, np.flatnonzero(np.r_[True, np.diff(group) != 0]), step)


def _groups(step: np.ndarray, window: np.ndarray) -> np.ndarray:
    """A number for each row, equal within a window: the schedule's, or else a stretch of steps."""
    group = np.where(np.isnan(window), step, window).astype(np.float64)
    changes = int(np.count_nonzero(np.diff(group)))
    if changes < MOST_POINTS:
        return group
    position = np.log1p(step.astype(np.float64))
    return np.floor(position / max(position[-1], 1e-300) * MOST_POINTS)  # the last step may be 0


def smooth(line: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(steps, means) averaged over three neighbouring points; fewer where there are fewer."""
    width = min(SMOOTHED, len(line.mean))
    if width == 0:
        return line.step, line.mean
    kernel = np.full(width, 1 / width)
    return np.convolve(line.step, kernel, "valid"), np.convolve(line.mean, kernel, "valid")


def reach(history: History, *, window: int | Literal["last"] = 5, size: int = 5) -> Reach:
    """`lnp.reach` of a run's positions: the population's where they are known, else the batch's.

    The windows of the schedule are what `window` and `size` count, and all of them where there are fewer. nan for a
    history without positions.
    """
    for column in (POSITION, "chi_pos"):
        positions = history.get(column).astype(np.float64)
        rows = np.flatnonzero(np.isfinite(positions))
        if not len(rows):
            continue
        steps = history["step"][rows].astype(np.float64)
        groups = history.get("window")[rows].astype(np.float64)
        groups = np.where(np.isnan(groups), steps, groups)
        count = int(np.count_nonzero(np.diff(groups))) + 1
        errors = history.get(f"{column}_stderr")[rows].astype(np.float64)
        chosen: Any = window if window == "last" else min(window, count)
        return spectral_reach.reach(steps, positions[rows], errors, window=chosen, size=min(size, count), groups=groups)
    return Reach(float("nan"), float("nan"), float("nan"), 0)


def stall_step(history: History, column: str) -> float:
    """The step from which on a column stays within a factor 1.25 of where it ends; nan if it still moves."""
    step, value = smooth(curve(history, column))
    if not len(value) or not 0 < value[-1] < np.inf:
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        moving = ~(np.abs(np.log(np.maximum(value, 0) / value[-1])) <= np.log(STALLED))
    start = int(np.flatnonzero(moving)[-1]) + 1 if moving.any() else 0
    return float(step[start]) if step[-1] >= STALLED_SPAN * step[start] and len(step) > 1 else float("nan")


def summary(history: History) -> Summary:
    """A run in numbers.

    Raises
    ------
    ValueError
        For a history without rows.
    """
    if not len(history):
        raise ValueError("The history has no rows. Expected at least one measurement.")
    loss = curve(history, "loss").mean
    columns = {name: name for name in FACTORS} | ({"chi_pos": POSITION} if POSITION in history else {})
    return Summary(
        rows=len(history),
        last_step=int(history["step"][-1]),
        parameters=size(history),
        first_loss=float(loss[0]) if len(loss) else float("nan"),
        loss=float(loss[-1]) if len(loss) else float("nan"),
        reach=reach(history),
        stalled={name: stall_step(history, column) for name, column in columns.items()},
    )


def is_frozen(run: History) -> bool:
    """Whether the run says by its tag `frozen` that features were not trained."""
    return run.numbers("frozen")[-1:].tolist() == [1.0]


def size(history: History) -> float:
    """Trained parameters of the run, the tag `parameters`; nan if it has none."""
    return float(history.numbers("parameters")[-1]) if len(history) else float("nan")


def compute(history: History) -> float:
    """Floating-point operations of training up to the last row, 6 N D for N parameters and D tokens; nan if unknown.

    D is the last step times the tag `tokens_per_step`: tokens of a language model, else samples. A forward pass costs
    2 N for each, a backward pass twice that (Kaplan et al., arXiv 2001.08361); convolutions, which use a parameter at
    many places, cost more.
    """
    if not len(history):
        return float("nan")
    return 6 * size(history) * float(history.numbers("tokens_per_step")[-1]) * float(history["step"][-1])
