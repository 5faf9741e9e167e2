"""The properties with Keras, on the framework that KERAS_BACKEND names. Few examples: each is compiled anew."""

from functools import partial
from operator import attrgetter

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import namespaces
from lnp.testing import Kit
from properties.common import NAMES, PROPERTIES

pytestmark = pytest.mark.filterwarnings("ignore:lnp compiled again")  # each network is a new function
xp = getattr(namespaces, keras.backend.backend())()


class Network(keras.Model):
    def __init__(self, scenario):
        super().__init__(dtype=str(scenario.inputs.dtype))
        self.function = scenario.apply
        self.names = tuple(scenario.parameters)
        for name, array in scenario.parameters.items():
            layer, _, last = name.rpartition(".")
            if not hasattr(self, layer):
                setattr(self, layer, keras.Layer(name=layer, dtype=array.dtype))
            owner = getattr(self, layer)
            setattr(owner, last, owner.add_weight(shape=array.shape, name=last, dtype=str(array.dtype)))
            getattr(owner, last).assign(array)
            owner.built = True
        self.built = True

    def call(self, inputs):
        return self.function(xp, {name: attrgetter(name)(self).value for name in self.names}, inputs)


kit = Kit(
    name="keras",
    framework="keras",
    build=lambda scenario: (Network(scenario), (scenario.inputs, scenario.targets)),
    loss=lambda loss: partial(loss.value, xp),
    snapshot=dict,
    to_numpy=lambda value: np.asarray(value.detach() if hasattr(value, "detach") else value),
)


@pytest.fixture(autouse=True)
def float64():
    with namespaces.float64(keras.backend.backend()):
        yield


TRIED = slice(1) if keras.backend.backend() == "jax" else slice(None)
"""On JAX one is enough to try how a model is handed over: the others are those of JAX's own backend."""


@pytest.mark.parametrize(("holds", "scenarios"), PROPERTIES[TRIED], ids=NAMES[TRIED])
@settings(max_examples=2, derandomize=True)
@given(data=st.data())
def test_property(holds, scenarios, data):
    holds(kit, data.draw(scenarios))
