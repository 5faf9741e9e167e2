"""The JAX backend keeps the contract, called eagerly and inside `jax.jit`."""

import random
from functools import cache, partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import lnp
from contract import namespaces
from contract.gate import most_thorough
from lnp.testing import CHECKS, COMPILED_CHECKS, Kit, flat, frozen, nested
from lnp.testing.numbers import NUMBER_CHECKS

pytestmark = pytest.mark.filterwarnings("ignore:lnp compiled again")  # the kit makes new functions on purpose


@pytest.fixture(autouse=True)
def float64():
    with namespaces.float64("jax"):
        yield


def apply(function, parameters, inputs):
    return function(jnp, flat(parameters), inputs)


@cache
def model_of(function):
    """One object for each network: compiled code is found by it."""
    return partial(apply, function)


def build(scenario):
    parameters = nested({name: jnp.asarray(array) for name, array in scenario.parameters.items()})
    return (model_of(scenario.apply), parameters), (jnp.asarray(scenario.inputs), jnp.asarray(scenario.targets))


def compiled(model, batch, loss=None, **options):
    function, parameters = model
    return jax.jit(lambda p, b: lnp.decompose((function, p), b, loss, **options))(parameters, batch)


def snapshot(model, batch):
    arrays = {**flat(model[1]), "inputs": batch[0], "targets": batch[1]}
    state = {"numpy": str(np.random.get_state()), "python": random.getstate(), "config": dict(jax.config.values)}  # noqa: NPY002
    return {name: frozen(array) for name, array in arrays.items()} | state


def kit(name, **how):
    return Kit(
        name=name,
        framework="jax",
        build=build,
        loss=lambda loss: partial(loss.value, jnp),
        snapshot=snapshot,
        update=lambda update: nested({key: jnp.asarray(array) for key, array in update.items()}),
        **how,
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check(kit("eager", dtypes=("float64",)))


@pytest.mark.thorough
@pytest.mark.parametrize("check", sorted(NUMBER_CHECKS, key=CHECKS.index), ids=lambda check: check.__name__)
def test_contract_in_float32(check):
    check(kit("eager", dtypes=("float32",)))


@pytest.mark.parametrize("check", most_thorough(COMPILED_CHECKS))
def test_contract_inside_jit(check):
    check(kit("inside jit", decompose=compiled, compiled=True, dtypes=("float64",)))
