"""Networks that change their mind, in JAX: called eagerly, and inside `jax.jit`."""

from dataclasses import replace

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from contract.test_jax import compiled, float64, kit
from lnp.testing import changing_networks, check_change, nested

__all__ = ["float64"]
pytestmark = pytest.mark.filterwarnings("ignore:lnp compiled again")  # the networks are new functions on purpose
NAMES = [network.early.name for network in changing_networks(bend=lambda backward: None)]


def moved(model, parameters):
    return model[0], nested({name: jnp.asarray(array) for name, array in parameters.items()})


def bend(backward):
    bent = jax.custom_vjp(lambda x: x)
    bent.defvjp(lambda x: (x, None), lambda _, d: (backward(d),))
    return bent


EAGER = replace(kit("eager"), moved=moved, bend=bend)
INSIDE = replace(kit("inside jit", decompose=compiled, compiled=True), moved=moved, bend=bend)


@pytest.mark.parametrize("name", NAMES)
def test_networks_that_change_their_mind(name):
    check_change(EAGER, changing_networks(0, 12, bend)[NAMES.index(name)])


@pytest.mark.parametrize("name", ["a gate at a threshold", "neighbours that meet", "experts of a capacity"])
def test_networks_that_change_their_mind_inside_jit(name):
    """Where nothing is compared before."""
    check_change(INSIDE, changing_networks(0, 12)[NAMES.index(name)])


@settings(max_examples=2, derandomize=True)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 10**6), half=st.integers(2, 20))
def test_variants_of_them(name, seed, half):
    check_change(EAGER, changing_networks(seed, 2 * half, bend)[NAMES.index(name)])
