"""The properties with JAX. Few examples: each architecture is compiled anew."""

from functools import cache, partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from contract.namespaces import float64
from lnp.testing import Kit, flat, nested
from properties.common import NAMES, PROPERTIES

pytestmark = pytest.mark.filterwarnings("ignore:lnp compiled again")  # each network is a new function


def apply(network, parameters, inputs):
    return network(jnp, flat(parameters), inputs)


@cache
def model_of(network):
    return partial(apply, network)


def build(scenario):
    parameters = nested({name: jnp.asarray(array) for name, array in scenario.parameters.items()})
    return (model_of(scenario.apply), parameters), (jnp.asarray(scenario.inputs), jnp.asarray(scenario.targets))


kit = Kit("jax", "jax", build, lambda loss: partial(loss.value, jnp), dict)


@pytest.mark.parametrize(("holds", "scenarios"), PROPERTIES, ids=NAMES)
@settings(max_examples=3, derandomize=True)
@given(data=st.data())
def test_property(holds, scenarios, data):
    with float64("jax"):
        holds(kit, data.draw(scenarios))
