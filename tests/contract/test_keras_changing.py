"""Networks that change their mind, in Keras on the framework that KERAS_BACKEND names."""

from dataclasses import replace
from operator import attrgetter

import keras
import pytest

from contract.test_keras import float64, kit
from lnp.testing import changing_networks, check_change

__all__ = ["float64"]

pytestmark = pytest.mark.filterwarnings("ignore:lnp compiled again")  # the networks are new functions on purpose
NAMES = [network.early.name for network in changing_networks(bend=lambda backward: None)]
KINDS = ("a gate at a threshold", "experts of a capacity", "a counter", "a backward pass that clips")
"""One of each kind: all of them are tried on the frameworks' own backends, which measure Keras's models."""


def moved(model, parameters):
    for name, array in parameters.items():
        attrgetter(name)(model).assign(array)
    return model


def bend(backward):
    @keras.ops.custom_gradient
    def bent(x):
        return keras.ops.copy(x), lambda *args, upstream=None: backward(args[0] if upstream is None else upstream)

    return bent


KIT = replace(kit, moved=moved, bend=bend)


@pytest.mark.parametrize("name", KINDS)
def test_networks_that_change_their_mind(name):
    check_change(KIT, changing_networks(0, 12, bend)[NAMES.index(name)])
