"""lnp's conformance kit, for the backend beside this file."""

import autograd.numpy as anp
import lnp_autograd
import numpy as np
import pytest

import lnp
from lnp.testing import CHECKS, Kit, frozen


class Namespace:
    """What the scenarios call, where autograd's NumPy has no derivative or another name for it."""

    def __getattr__(self, name):
        return getattr(anp, name)

    @staticmethod
    def take(array, index, axis=0):
        return array[index]

    @staticmethod
    def matrix_transpose(array):
        return anp.swapaxes(array, -1, -2)


def build(scenario):
    def apply(parameters, inputs):
        return scenario.apply(Namespace(), parameters, inputs)

    return lnp_autograd.Model(apply, dict(scenario.parameters)), (scenario.inputs, scenario.targets)


def snapshot(model, batch):
    arrays = {**model.parameters, "inputs": batch[0], "targets": batch[1]}
    return {name: frozen(array) for name, array in arrays.items()} | {"errors": np.geterr()}


kit = Kit(
    name="autograd",
    framework="autograd",
    build=build,
    loss=lambda loss: lambda f, y: loss.value(Namespace(), f, y),
    snapshot=snapshot,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check(kit)


def test_it_is_found_by_its_entry_point():
    model = lnp_autograd.Model(lambda p, x: anp.tanh(x @ p["w"]), {"w": np.ones((2, 3))})
    d = lnp.decompose(model, (np.eye(2), np.array([0, 1])))
    assert d.rate == pytest.approx(d.chi_loss * d.chi_net * d.chi_pos)
    assert d.loss_name == "cross-entropy of logits, inferred from the targets"
