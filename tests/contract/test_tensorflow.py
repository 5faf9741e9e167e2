"""The TensorFlow backend keeps the contract, with modules and with functions, outside and inside `tf.function`."""

import random
from functools import partial
from operator import attrgetter

import numpy as np
import pytest
import tensorflow as tf

import lnp
from contract.gate import most_thorough
from contract.namespaces import tensorflow
from lnp.testing import CHECKS, COMPILED_CHECKS, Kit, flat, frozen, nested
from lnp.testing.estimators import auto_chooses
from lnp.testing.numbers import (
    exact_factors_are_those_of_the_dense_kernel,
    layers_add_up,
    parameters_are_selected,
)
from lnp.testing.record import (
    RECORD_CHECKS,
    interacting_samples_are_noticed,
    record_holds_values,
    sample_square_norms_are_those_of_single_samples,
    signs_are_independent,
)
from lnp.testing.safety import non_finite_values_are_passed_on

xp = tensorflow()


class Network(tf.Module):
    """A scenario as a module that also has what a measurement might disturb: a counter, attributes, a generator."""

    def __init__(self, scenario):
        super().__init__()
        self.apply = scenario.apply
        self.names = tuple(scenario.parameters)
        for name, array in scenario.parameters.items():
            owner = self
            *path, last = name.split(".")
            for key in path:
                if not hasattr(owner, key):
                    setattr(owner, key, tf.Module())
                owner = getattr(owner, key)
            setattr(owner, last, tf.Variable(array))
        self.calls = tf.Variable(0, trainable=False)
        self.generator = tf.random.Generator.from_seed(1)

    def __call__(self, inputs):
        self.calls.assign_add(1)
        self.last = inputs
        self.generator.normal(())
        return self.apply(xp, {name: attrgetter(name)(self) for name in self.names}, inputs)


def batch_of(scenario):
    return tf.constant(scenario.inputs), tf.constant(scenario.targets)


def module(scenario):
    return Network(scenario), batch_of(scenario)


def function(scenario):
    parameters = nested({name: tf.constant(array) for name, array in scenario.parameters.items()})
    return (lambda p, x: scenario.apply(xp, flat(p), x), parameters), batch_of(scenario)


def closure(scenario):
    variables = nested({name: tf.Variable(array) for name, array in scenario.parameters.items()})
    return (lambda x: scenario.apply(xp, flat(variables), x), variables), batch_of(scenario)


def compiled(model, batch, loss=None, **options):
    return tf.function(lambda batch: lnp.decompose(model, batch, loss, **options), autograph=False)(batch)


def snapshot(model, batch):
    state = {
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "python": random.getstate(),
        "global generator": frozen(tf.random.get_global_generator().state),
        "eager": tf.config.functions_run_eagerly(),
        "inputs": frozen(batch[0]),
        "targets": frozen(batch[1]),
    }
    if not isinstance(model, Network):
        return state | {name: frozen(value) for name, value in flat(model[1]).items()}
    variables = {v.name + str(i): frozen(v) for i, v in enumerate(model.variables)}
    return state | variables | {"attributes": sorted(vars(model)), "handles": [id(v) for v in model.variables]}


def kit(name, build, **how):
    return Kit(
        name=name,
        framework="tensorflow",
        build=build,
        loss=lambda loss: partial(loss.value, xp),
        snapshot=snapshot,
        update=lambda update: {key: tf.constant(array) for key, array in update.items()},
        **how,
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check(kit("module", module, dtypes=("float64",)))


IN_FLOAT32 = (
    record_holds_values,
    sample_square_norms_are_those_of_single_samples,
    interacting_samples_are_noticed,
    signs_are_independent,
    exact_factors_are_those_of_the_dense_kernel,
    non_finite_values_are_passed_on,
)
"""Where the type of the numbers decides: dtypes, tolerances, what overflows."""


@pytest.mark.thorough
@pytest.mark.parametrize("check", IN_FLOAT32, ids=lambda check: check.__name__)
def test_contract_in_float32(check):
    check(kit("module", module, dtypes=("float32",)))


@pytest.mark.thorough
@pytest.mark.parametrize("check", RECORD_CHECKS, ids=lambda check: check.__name__)
def test_contract_of_functions(check):
    """What follows from how a function is read; which estimator is taken, and errors, are the same for all models."""
    check(kit("function", function, dtypes=("float64",)))


INSIDE = [check for check in COMPILED_CHECKS if check not in (auto_chooses, parameters_are_selected, layers_add_up)]
"""What a graph around the measurement may change: not what is chosen before anything is traced."""


@pytest.mark.parametrize("check", most_thorough(INSIDE))
def test_contract_inside_a_function(check):
    check(kit("closure, inside tf.function", closure, decompose=compiled, compiled=True, dtypes=("float64",)))
