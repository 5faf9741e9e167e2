"""Means over runs that differ in their seeds alone."""

from __future__ import annotations

import numpy as np
import pytest

from lnp.runs.seeds import mean_over_seeds
from lnp.tracking.history import History


def run(values, first_step=0):
    return History([{"step": first_step + step, "loss": value} for step, value in enumerate(values)])


def test_errors_are_those_of_the_spread_over_runs():
    runs = np.random.default_rng(0).normal(size=(4, 3))
    line = mean_over_seeds([run(values) for values in runs.tolist()], "loss")
    error = runs.std(axis=0, ddof=1) / 2
    assert line.mean == pytest.approx(runs.mean(axis=0))
    assert line.stderr == pytest.approx(error)
    assert (line.low, line.high) == (pytest.approx(runs.mean(axis=0) - error), pytest.approx(runs.mean(axis=0) + error))
    assert (line.step.tolist(), line.first.tolist(), line.last.tolist()) == ([0, 1, 2],) * 3


def test_a_single_run_has_no_error():
    assert np.isnan(mean_over_seeds([run([1.0, 2.0])], "loss").stderr).tolist() == [True, True]


@pytest.mark.parametrize("others", [[run([1.0, 2.0], first_step=1)], [run([1.0, 2.0]), run([1.0])], None])
def test_runs_that_were_measured_at_different_steps_are_refused(others):
    runs = [] if others is None else [run([1.0, 2.0]), *others]
    with pytest.raises(ValueError, match="The runs have 'loss' at different steps"):
        mean_over_seeds(runs, "loss")
