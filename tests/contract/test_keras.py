"""The Keras backend keeps the contract, on the framework that KERAS_BACKEND names."""

import random
from functools import partial
from operator import attrgetter

import keras
import numpy as np
import pytest

from contract import namespaces
from lnp.testing import CHECKS, Kit, frozen
from lnp.testing.batches import BATCH_CHECKS
from lnp.testing.estimators import ESTIMATOR_CHECKS
from lnp.testing.numbers import exact_factors_are_those_of_the_dense_kernel, layers_add_up
from lnp.testing.record import RECORD_CHECKS

pytestmark = [
    pytest.mark.filterwarnings("ignore:lnp compiled again"),  # the kit makes new functions on purpose
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # inside Keras
]
xp = getattr(namespaces, keras.backend.backend())()


@pytest.fixture(autouse=True)
def float64():
    with namespaces.float64(keras.backend.backend()):
        yield


class Network(keras.Model):
    """A scenario as a model that also has what a measurement might disturb: a counter, a seed, dropout, a loss."""

    def __init__(self, scenario):
        super().__init__(dtype=str(next(iter(scenario.parameters.values())).dtype))
        self.function = scenario.apply  # what it has closed over is part of the model
        self.names = tuple(scenario.parameters)
        for name, array in scenario.parameters.items():
            owner = self
            *path, last = name.split(".")
            for key in path:
                if not hasattr(owner, key):
                    setattr(owner, key, keras.Layer(name=key, dtype=array.dtype))
                owner = getattr(owner, key)
            setattr(owner, last, owner.add_weight(shape=array.shape, name=last, dtype=str(array.dtype)))
            getattr(owner, last).assign(array)
            owner.built = True
        self.calls = self.add_weight(shape=(), trainable=False, name="calls", initializer="zeros")
        self.dropout = keras.layers.Dropout(0.5, seed=0)
        self.built = True

    def call(self, inputs, training=None):
        self.calls.assign(self.calls + 1)
        self.dropout(inputs * 1.0 if inputs.dtype == self.calls.dtype else self.calls[None], training=training)
        return self.function(xp, {name: attrgetter(name)(self).value for name in self.names}, inputs)


def build(scenario):
    return Network(scenario), (scenario.inputs, scenario.targets)


def snapshot(model, batch):
    state = {
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "python": random.getstate(),
        "inputs": frozen(batch[0]),
        "targets": frozen(batch[1]),
        "floatx": keras.config.floatx(),
    }
    layers = {layer.name: (layer.trainable, sorted(vars(layer))) for layer in model._flatten_layers()}
    variables = {v.path: (frozen(keras.ops.convert_to_numpy(v.value)), v.trainable) for v in model.variables}
    return state | layers | variables


kit = Kit(
    name=f"Keras on {keras.backend.backend()}",
    framework="keras",
    build=build,
    loss=lambda loss: partial(loss.value, xp),
    snapshot=snapshot,
    dtypes=("float64",),  # in float32 the integrations' models are measured
    to_numpy=lambda value: np.asarray(value.detach() if hasattr(value, "detach") else value),
)


ELSEWHERE = (*ESTIMATOR_CHECKS, exact_factors_are_those_of_the_dense_kernel, layers_add_up)
"""What does not depend on how a model is read: tried by the contracts of the frameworks' own backends."""


SLOW = () if keras.backend.backend() == "torch" else (*RECORD_CHECKS, *BATCH_CHECKS)
"""What takes minutes to compile elsewhere, and says what Keras on PyTorch and the frameworks' own contracts say."""


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=check.__name__, marks=[pytest.mark.thorough] * (check in SLOW))
        for check in CHECKS
        if check not in ELSEWHERE
    ],
)
def test_contract(check):
    check(kit)
