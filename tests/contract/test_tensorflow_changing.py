"""Networks that change their mind, in TensorFlow."""

from dataclasses import replace
from operator import attrgetter

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.test_tensorflow import kit, module
from lnp.testing import changing_networks, check_change

NAMES = [network.early.name for network in changing_networks(bend=lambda backward: None)]


def moved(model, parameters):
    for name, array in parameters.items():
        attrgetter(name)(model).assign(array)
    return model


def bend(backward):
    return tf.custom_gradient(lambda x: (tf.identity(x), backward))


KIT = replace(kit("module", module), moved=moved, bend=bend)


@pytest.mark.parametrize("name", NAMES)
def test_networks_that_change_their_mind(name):
    check_change(KIT, changing_networks(0, 12, bend)[NAMES.index(name)])


@settings(max_examples=2, derandomize=True)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 10**6), half=st.integers(2, 20))
def test_variants_of_them(name, seed, half):
    check_change(KIT, changing_networks(seed, 2 * half, bend)[NAMES.index(name)])
