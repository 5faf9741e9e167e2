"""The properties with TensorFlow. Few examples: each architecture is traced anew."""

from functools import cache, partial

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.namespaces import tensorflow
from lnp.testing import Kit, flat, nested
from properties.common import NAMES, PROPERTIES

xp = tensorflow()


def apply(network, parameters, inputs):
    return network(xp, flat(parameters), inputs)


@cache
def model_of(network):
    return partial(apply, network)


def build(scenario):
    parameters = nested({name: tf.constant(array) for name, array in scenario.parameters.items()})
    return (model_of(scenario.apply), parameters), (tf.constant(scenario.inputs), tf.constant(scenario.targets))


kit = Kit("tensorflow", "tensorflow", build, lambda loss: partial(loss.value, xp), dict)


@pytest.mark.parametrize(("holds", "scenarios"), PROPERTIES, ids=NAMES)
@settings(max_examples=2, derandomize=True)
@given(data=st.data())
def test_property(holds, scenarios, data):
    holds(kit, data.draw(scenarios))
