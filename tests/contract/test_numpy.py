"""The NumPy backend keeps the contract."""

import random

import numpy as np
import pytest

import lnp_numpy
from lnp.testing import CHECKS, Kit, frozen


def build(scenario):
    def function(parameters, inputs):
        return scenario.apply(np, parameters, inputs)

    def jacobian(parameters, inputs):
        shape = function(parameters, inputs).shape
        dense = scenario.jacobian(parameters, inputs)
        return {name: array.reshape(shape + parameters[name].shape) for name, array in dense.items()}

    model = lnp_numpy.JacobianModel(function, jacobian, scenario.parameters)
    return model, (scenario.inputs, scenario.targets)


def snapshot(model, batch):
    arrays = {**model.parameters, "inputs": batch[0], "targets": batch[1]}
    state = {"numpy": str(np.random.get_state()), "python": random.getstate(), "errors": np.geterr()}  # noqa: NPY002
    return {name: frozen(array) for name, array in arrays.items()} | state


kit = Kit(
    name="numpy",
    framework="numpy",
    build=build,
    loss=lambda loss: lambda f, y: (loss.value(np, f, y), loss.gradient(f, y)),
    snapshot=snapshot,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check(kit)
