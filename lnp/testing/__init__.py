"""The conformance kit that every backend of lnp passes.

Scenarios are small networks whose outputs, loss gradients and Jacobians are known by formula, written once with
operators and an array namespace. A backend says in a `Kit` how its framework builds them, and runs `CHECKS`:

>>> import numpy, lnp_numpy
>>> from lnp.testing import CHECKS, Kit, frozen
>>> def build(scenario):
...     def function(parameters, inputs):
...         return scenario.apply(numpy, parameters, inputs)
...     def jacobian(parameters, inputs):
...         shape = function(parameters, inputs).shape
...         dense = scenario.jacobian(parameters, inputs)
...         return {name: array.reshape(shape + parameters[name].shape) for name, array in dense.items()}
...     model = lnp_numpy.JacobianModel(function, jacobian, scenario.parameters)
...     return model, (scenario.inputs, scenario.targets)
>>> kit = Kit(
...     name="numpy",
...     framework="numpy",
...     build=build,
...     loss=lambda loss: lambda f, y: (loss.value(numpy, f, y), loss.gradient(f, y)),
...     snapshot=lambda model, batch: {name: frozen(array) for name, array in model.parameters.items()},
... )
>>> CHECKS[0](kit)  # raises AssertionError unless the backend is right

With pytest:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check):
        check(kit)

Networks that look innocent at the first measurement and change later are drawn from a seed, for a kit that says how a
model is `moved` to other parameters:

    @pytest.mark.parametrize("network", changing_networks(seed=0), ids=lambda network: network.early.name)
    def test_networks_that_change_their_mind(network):
        check_change(kit, network)

A kit whose `decompose` is compiled runs `COMPILED_CHECKS`, those of the numbers. The checks need neither pytest nor a
framework, and raise AssertionError with the kit, the scenario and both values.
"""

from lnp.testing.batches import BATCH_CHECKS
from lnp.testing.changing import Changing, changing_networks, check_change
from lnp.testing.estimators import ESTIMATOR_CHECKS, enumerated_signs_give_trace_and_variance
from lnp.testing.kit import Kit, flat, frozen, nested
from lnp.testing.numbers import (
    NUMBER_CHECKS,
    cross_response_is_the_dense_one,
    loss_changes_are_those_of_the_step,
    spectrum_is_the_dense_measure,
)
from lnp.testing.oracle import Loss, Truth
from lnp.testing.record import RECORD_CHECKS
from lnp.testing.safety import SAFETY_CHECKS
from lnp.testing.scenarios import Scenario

CHECKS = (*RECORD_CHECKS, *ESTIMATOR_CHECKS, *NUMBER_CHECKS, *BATCH_CHECKS, *SAFETY_CHECKS)
"""Every check: a function of a `Kit` that raises AssertionError."""
COMPILED_CHECKS = tuple(
    check
    for check in (*ESTIMATOR_CHECKS, *NUMBER_CHECKS, *SAFETY_CHECKS)
    if check
    not in (
        enumerated_signs_give_trace_and_variance,
        cross_response_is_the_dense_one,
        loss_changes_are_those_of_the_step,
        spectrum_is_the_dense_measure,
    )
)
"""The checks that go through `Kit.decompose`."""

__all__ = [
    "CHECKS",
    "COMPILED_CHECKS",
    "Changing",
    "Kit",
    "Loss",
    "Scenario",
    "Truth",
    "changing_networks",
    "check_change",
    "flat",
    "frozen",
    "nested",
]
