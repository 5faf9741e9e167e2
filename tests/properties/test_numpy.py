"""The properties with NumPy, whose Jacobians come from forward accumulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lnp_numpy
from lnp.testing import Kit
from properties.common import NAMES, PROPERTIES


def build(scenario):
    model = lnp_numpy.JacobianModel(lambda p, x: scenario.apply(np, p, x), scenario.jacobian, scenario.parameters)
    return model, (scenario.inputs, scenario.targets)


kit = Kit("numpy", "numpy", build, lambda loss: lambda f, y: (loss.value(np, f, y), loss.gradient(f, y)), dict)


@pytest.mark.parametrize(("holds", "scenarios"), PROPERTIES, ids=NAMES)
@settings(max_examples=60, derandomize=True)
@given(data=st.data())
def test_property(holds, scenarios, data):
    holds(kit, data.draw(scenarios))
