"""What a run's history says: averages over windows, spectral reach, and where each factor stalls."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lnp.runs.spectral_reach import reach as lowest
from lnp.tracking.history import History

MOST_POINTS = 400
"""Points of a curve; a history with more is averaged over stretches that are even in the logarithm of the step."""
SMOOTHED = 3
"""Points that are averaged before the lowest position is taken, so that a lucky one does not count."""
STALLED = 1.25
"""A factor has stalled once it stays within this factor of where it ends."""
STALLED_SPAN = 1.5
"""What is left of the run then has to be at least this factor in steps."""
FACTORS = ("chi_loss", "chi_net", "chi_pos")
POSITION, NOISE_SCALE = "population/chi_pos", "population/noise_scale"

Runs = Mapping[str, History]


@dataclass(frozen=True)
class Curve:
    """A quantity along a run, averaged over windows: (points,) each.

    Attributes
    ----------
    step:
        The middle of each window.
    mean, stderr:
        Of the window's measurements; the error of a single measurement is its own, nan where it has none.
    first, last:
        The window's steps.
    """

    step: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray
    first: np.ndarray
    last: np.ndarray


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
        At the first and the last window.
    reach, reach_stderr, reach_step:
        The lowest spectral position of the population (of the batch, where the population's is not known), averaged
        over three windows, with its error, and where it is attained.
    stalled:
        {factor: the step from which on it stays within a factor 1.25 of where it ends}; nan for one that still moves.
    """

    rows: int
    last_step: int
    parameters: float
    first_loss: float
    loss: float
    reach: float
    reach_stderr: float
    reach_step: float
    stalled: Mapping[str, float]


def curve(history: History, column: str) -> Curve:
    """A column averaged over the windows of the schedule. Rows in which it is nan are left out.

    The noise scale is a ratio, of which numerator and denominator are averaged: tr Cov and ||grad L||^2. It is infinite
    where the mean of the latter is not larger than its standard error: then nobody knows.
    """
    if column == NOISE_SCALE:
        return _noise_scale(history)
    values = history.get(column).astype(np.float64)
    windows = _windows(history, values)
    own = history.get(f"{column}_stderr")
    mean, error = windows.mean(values), windows.error(values)
    return Curve(windows.middle, mean, np.where(windows.size > 1, error, windows.first_of(own)), *windows.ends)


def _noise_scale(history: History) -> Curve:
    scale, rate = (history.get(name).astype(np.float64) for name in (NOISE_SCALE, "population/rate"))
    windows = _windows(history, scale * rate)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_rate = windows.mean(rate)
        ratio = windows.mean(scale * rate) / mean_rate
        residual = scale * rate - windows.spread(ratio, len(rate)) * rate
        error = windows.error(residual) / np.abs(mean_rate)
        own = windows.first_of(history.get(f"{NOISE_SCALE}_stderr"))
        known = mean_rate > np.where(
            windows.size > 1, windows.error(rate), windows.first_of(history.get("population/rate_stderr"))
        )
    seen = np.where(known, ratio, np.inf)
    return Curve(windows.middle, seen, np.where(windows.size > 1, error, own), *windows.ends)


@dataclass(frozen=True)
class _Windows:
    """The rows in which a quantity is known, and where among them each window begins."""

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
        if not len(self.rows):
            return np.empty(0)
        return np.add.reduceat(values[self.rows].astype(np.float64), self.start) / self.size

    def error(self, values: np.ndarray) -> np.ndarray:
        """Standard error of the mean; 0 for a single row."""
        with np.errstate(invalid="ignore"):  # of infinities
            away = values[self.rows] - np.repeat(self.mean(values), self.size)
            return np.sqrt(self.mean(self.spread_rows(away**2, len(values))) / np.maximum(self.size - 1, 1))

    def first_of(self, values: np.ndarray) -> np.ndarray:
        return values[self.rows][self.start].astype(np.float64)

    def spread(self, of_windows: np.ndarray, rows: int) -> np.ndarray:
        """A value of each window at each of its rows."""
        return self.spread_rows(np.repeat(of_windows, self.size), rows)

    def spread_rows(self, values: np.ndarray, rows: int) -> np.ndarray:
        everywhere = np.full(rows, np.nan)
        everywhere[self.rows] = values
        return everywhere


def _windows(history: History, values: np.ndarray) -> _Windows:
    rows = np.flatnonzero(~np.isnan(values))
    if not len(rows):
        return _Windows(rows, rows, np.empty(0))
    step = history["step"][rows]
    group = _groups(step, history.get("window")[rows])
    return _Windows(rows, np.flatnonzero(np.r_[True, np.diff(group) != 0]), step)


def _groups(step: np.ndarray, window: np.ndarray) -> np.ndarray:
    """A number for each row, equal within a window: the schedule's, or else a stretch of steps."""
    known = ~np.isnan(window)
    group = np.where(known, window, step).astype(np.float64)
    changes = int(np.count_nonzero(np.diff(group)))
    if changes < MOST_POINTS:
        return group
    position = np.log1p(step.astype(np.float64))
    return np.floor(position / max(position[-1], 1e-300) * MOST_POINTS)


def smoothed(line: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(steps, means) averaged over three neighbouring points; fewer where there are fewer."""
    width = min(SMOOTHED, len(line.mean))
    if width == 0:
        return line.step, line.mean
    kernel = np.full(width, 1 / width)
    return np.convolve(line.step, kernel, "valid"), np.convolve(line.mean, kernel, "valid")


def reach(history: History) -> tuple[float, float, float]:
    """(spectral reach, its standard error, the step at which it is attained) over three windows of the run, as
    `lnp.reach` has it; nan for a history without positions.
    """
    for column in (POSITION, "chi_pos"):
        line = curve(history, column)
        known = np.isfinite(line.mean)
        if known.any():
            errors, width = np.nan_to_num(line.stderr[known]), min(SMOOTHED, int(known.sum()))
            found = lowest(line.step[known], line.mean[known], errors, window=width)
            return found.chi_pos, found.stderr, found.step
    return float("nan"), float("nan"), float("nan")


def stalled(history: History, column: str) -> float:
    """The step from which on a column stays within a factor 1.25 of where it ends; nan if it still moves."""
    step, value = smoothed(curve(history, column))
    if not len(value) or not 0 < value[-1] < np.inf:
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        away = ~(np.abs(np.log(np.maximum(value, 0) / value[-1])) <= np.log(STALLED))
    start = int(np.flatnonzero(away)[-1]) + 1 if away.any() else 0
    return float(step[start]) if step[-1] >= STALLED_SPAN * step[start] and len(step) - start > 1 else float("nan")


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
    lowest, error, where = reach(history)
    position = POSITION if POSITION in history else "chi_pos"
    columns = dict(zip(FACTORS, ("chi_loss", "chi_net", position), strict=True))
    return Summary(
        rows=len(history),
        last_step=int(history["step"][-1]),
        parameters=size(history),
        first_loss=float(loss[0]) if len(loss) else float("nan"),
        loss=float(loss[-1]) if len(loss) else float("nan"),
        reach=lowest,
        reach_stderr=error,
        reach_step=where,
        stalled={name: stalled(history, column) for name, column in columns.items()},
    )


def size(history: History) -> float:
    """Trained parameters of the run, the tag `parameters`; nan if it has none."""
    values = history.get("parameters")
    return float(values[-1]) if len(values) and isinstance(values[-1], np.number | int | float) else float("nan")


def runs_of(given: Any) -> dict[str, History]:
    """{name: history} from a history, a tracker, a path, a folder, a list of these, or a dictionary of them.

    A folder stands for the `.jsonl` files in it. Names are those of the files, without what they share.

    Raises
    ------
    TypeError
        For anything else.
    OSError
        For a path at which there is nothing, or a folder without histories.
    """
    if isinstance(given, Mapping):
        return {str(name): _history(run) for name, run in given.items()}
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str | History) else [given]
    flat: list[Any] = []
    for run in listed:
        flat += _files(Path(run)) if isinstance(run, str | os.PathLike) else [run]
    names = iter(_names([item for item in flat if isinstance(item, Path)]))
    return {next(names) if isinstance(run, Path) else f"run {i}": _history(run) for i, run in enumerate(flat)}


def paths_of(given: Iterable[str | os.PathLike]) -> dict[str, Path]:
    """{name: file} from files and folders."""
    files = [file for path in given for file in _files(Path(path))]
    return dict(zip(_names(files), files, strict=True))


def _history(run: Any) -> History:
    if isinstance(run, History):
        return run
    if isinstance(run, str | os.PathLike):
        return History.read(run)
    if isinstance(getattr(run, "history", None), History):
        return run.history
    raise TypeError(
        f"A run is of type {type(run).__name__}. Expected a History, a Tracker, the path of a tracker's file, or a "
        "folder of such files."
    )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.jsonl"), key=_natural)
    if not found:
        raise FileNotFoundError(f"{path} holds no .jsonl file. Expected the files that trackers write.")
    return found


def _natural(path: Path) -> tuple:
    """Sorted as people count: width-8 before width-16."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name))


def _names(paths: list[Path]) -> list[str]:
    """The files' names; with their folders, as many as it takes, where two would be equal."""
    if len({path.stem for path in paths}) == len(paths):
        return [path.stem for path in paths]
    full = [path.resolve().with_suffix("").parts for path in paths]
    for depth in range(2, max(map(len, full)) + 1):
        names = ["/".join(parts[-depth:]) for parts in full]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
