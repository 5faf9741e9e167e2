"""PyTorch, JAX, TensorFlow, Keras and NumPy agree on the same weights and data to 1e-10. Needs all of them together."""

import importlib.util

import pytest
from hypothesis import given, settings

from properties.common import scenarios

if not all(importlib.util.find_spec(name) for name in ("torch", "jax", "tensorflow", "keras")):
    pytest.skip("needs torch, jax, tensorflow and keras", allow_module_level=True)

import jax

from properties import test_jax, test_keras, test_numpy, test_tensorflow, test_torch

pytestmark = pytest.mark.filterwarnings("ignore:lnp compiled again")  # each network is a new function
KITS = (test_torch.kit, test_jax.kit, test_tensorflow.kit, test_keras.kit)
NUMBERS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos", "loss_terms")


@settings(max_examples=2, derandomize=True)
@given(scenario=scenarios())
def test_parity(scenario):
    """By exact probes, and by random ones: signs are the same in every framework."""
    random = {"estimator": "per_sample", "rtol": 0.0, "max_probes": 4, "seed": 3}
    estimated = test_numpy.kit.measure(scenario, **random)
    expected = test_numpy.kit.measure(scenario, estimator="exact", by_layer=True)
    with jax.enable_x64(True):
        for kit in KITS:
            found = kit.measure(scenario, estimator="exact", by_layer=True)
            same(found, expected, NUMBERS)
            same(kit.measure(scenario, **random), estimated, ("chi_net", "chi_net_stderr", "probes"))
            assert set(found.layers) == set(expected.layers)
            for layer, part in expected.layers.items():
                same(found.layers[layer], part, ("rate", "chi_net", "chi_pos"))


def same(found, expected, names):
    for name in names:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-10, abs=1e-13, nan_ok=True), name
