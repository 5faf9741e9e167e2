"""How many points a curve has, and how much of a run shows that a factor has stalled."""

from __future__ import annotations

import math

import numpy as np
import pytest

import lnp
from lnp.runs.curves import curve, stall_step


def history(steps):
    return lnp.History([{"step": step, "chi_loss": 1.0} for step in steps])


@pytest.mark.parametrize(("measured", "kept"), [(400, True), (401, False)])
def test_a_curve_of_up_to_400_measurements_has_them_all(measured, kept):
    line = curve(history(range(measured)), "chi_loss")
    assert (len(line.step) == measured) is kept
    assert np.sum(line.last - line.first + 1) == measured


@pytest.mark.parametrize(("last", "stalls"), [(17, False), (18, True)])
def test_a_factor_has_stalled_once_that_holds_for_half_as_many_steps_again(last, stalls):
    """Of averages over three neighbours, which begin at step 11 and end one before the last."""
    found = stall_step(history(range(10, last + 1)), "chi_loss")
    assert found == 11 if stalls else math.isnan(found)
