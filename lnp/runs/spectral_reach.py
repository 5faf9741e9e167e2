r"""Spectral reach: how far into the spectral tail a run gets, and how that scales with the size of the model.

    reach = min over windows of the mean of chi_pos in the window

The lowest position that a run attains, smoothed over a window of measurements, since single ones are noisy and a
minimum picks the luckiest. Larger models reach lower; frozen representations stall.

Source: Nikolaou, Scheunemann, Krippendorf, Tovey, Holm, "Spectral Reach", arXiv 2605.31244.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np


@dataclass(frozen=True)
class Reach:
    """The lowest smoothed position of a run, or the mean over repeated runs.

    Attributes
    ----------
    chi_pos:
        The reach; below zero only within the error, where population positions came in.
    stderr:
        Its standard error: of the mean in the window, or over the runs. nan where nothing tells.
    step:
        Middle of the window in which it was attained (geometric mean of its steps; mean over runs likewise).
    window:
        Measurements that were averaged.
    runs:
        Runs that were averaged.
    """

    chi_pos: float
    stderr: float
    step: float
    window: int
    runs: int = 1


def reach(
    steps: Sequence[float], positions: Sequence[float], stderrs: Sequence[float] | None = None, *, window: int = 5
) -> Reach:
    r"""The spectral reach of one run.

    The mean over each window of neighbouring measurements is taken, and the lowest of these means. Late in training
    pass the population's positions: a small batch's own are its sampling noise (docs/theory.md, "Finite batches").

    Parameters
    ----------
    steps, positions:
        The steps that were measured, rising, and chi_pos there, or `Decomposition.population.chi_pos`.
    stderrs:
        Standard errors of the positions. The reach's error is then the larger of what they give, sqrt(sum SE^2) / w,
        and of what the scatter within the window gives, std / sqrt(w); without them, or where one in the window is nan,
        it is the scatter's.
    window:
        w, measurements to average: 1 or more, at most all.

    Raises
    ------
    ValueError
        For lists of different lengths, steps that do not rise, and a window that does not fit.

    Examples
    --------
    >>> found = reach([1, 10, 100, 1000], [0.4, 0.2, 0.1, 0.2], window=2)
    >>> round(found.chi_pos, 9), round(found.stderr, 9), round(found.step, 6)
    (0.15, 0.05, 31.622777)
    """
    x = np.asarray(steps, dtype=float)
    y = np.asarray(positions, dtype=float)
    e = np.full_like(y, np.nan) if stderrs is None else np.asarray(stderrs, dtype=float)
    if not (x.ndim == 1 and x.shape == y.shape == e.shape):
        raise ValueError(f"Received shapes {x.shape}, {y.shape}, {e.shape}. Expected one position for each step.")
    if np.any(np.diff(x) <= 0):
        raise ValueError("The steps do not rise. Expected one run, in order; use reach_of_runs for several.")
    if not (isinstance(window, Integral) and 1 <= window <= y.size):
        raise ValueError(f"window is {window} for {y.size} measurements. Expected between 1 and all of them.")
    windows = np.lib.stride_tricks.sliding_window_view(y, window)
    means = windows.mean(axis=1)
    if np.all(np.isnan(means)):
        return Reach(math.nan, math.nan, math.nan, window)
    lowest = int(np.nanargmin(means))
    best = slice(lowest, lowest + window)
    scatter = float(np.std(y[best], ddof=1)) / math.sqrt(window) if window > 1 else math.nan
    propagated = float(np.sqrt(np.sum(e[best] ** 2))) / window
    return Reach(float(means[lowest]), float(np.fmax(propagated, scatter)), _middle(x[best]), window)


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


def _middle(steps: np.ndarray) -> float:
    """Geometric mean; arithmetic where step 0 is among them."""
    return float(np.exp(np.mean(np.log(steps)))) if np.all(steps > 0) else float(np.mean(steps))
