"""Runs that differ in their seeds alone: means over them, with the errors that their spread tells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lnp.runs.curves import Curve, curve
from lnp.tracking.history import History


def mean_over_seeds(runs: Sequence[History], column: str) -> Curve:
    """The mean over runs of a column, (points,), with its standard error s / sqrt(R) of R runs; nan for a single run.

    Examples
    --------
    >>> runs = [History([{"step": 0, "loss": value}]) for value in (1.0, 3.0)]
    >>> found = mean_over_seeds(runs, "loss")
    >>> found.mean.tolist(), found.stderr.tolist(), found.low.tolist(), found.high.tolist()
    ([2.0], [1.0], [1.0], [3.0])

    Raises
    ------
    ValueError
        For runs that were measured at different steps.
    """
    curves = [curve(run, column) for run in runs]
    if not curves or any(not np.array_equal(c.step, curves[0].step) for c in curves):
        raise ValueError(
            f"The runs have {column!r} at different steps ({', '.join(str(len(c.step)) for c in curves)} of them). "
            "Expected runs with the same schedule, which differ in their seeds."
        )
    values = np.array([c.mean for c in curves])
    mean = values.mean(axis=0)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.full_like(mean, np.nan)
    return Curve(curves[0].step, mean, error, curves[0].first, curves[0].last, mean - error, mean + error)
