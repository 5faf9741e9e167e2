"""Which checks of compiled code run before every change, and which in the session `thorough`."""

import pytest

from lnp.testing.estimators import interacting_samples_are_measured_jointly
from lnp.testing.numbers import exact_factors_are_those_of_the_dense_kernel
from lnp.testing.safety import no_trace_is_left_by_an_error

KEPT = (
    exact_factors_are_those_of_the_dense_kernel,
    interacting_samples_are_measured_jointly,
    no_trace_is_left_by_an_error,
)


def most_thorough(checks):
    """Parameters of a test: all checks, those that are not kept with the mark `thorough`."""
    mark = pytest.mark.thorough
    return [pytest.param(check, id=check.__name__, marks=() if check in KEPT else mark) for check in checks]
