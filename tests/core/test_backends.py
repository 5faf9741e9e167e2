"""Finding the backend of a model, and what is said where there is none."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.contract import registry

MODEL = lnp_numpy.LinearModel(weight=np.zeros((2, 1)))


def model_of(module):
    return type("Net", (), {"__module__": module})()


def test_numpy_models_are_found():
    assert registry.find(MODEL) is lnp_numpy


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_framework_that_is_not_loaded(framework, monkeypatch):
    """The message names the model's type, the import and the extra."""
    monkeypatch.delitem(sys.modules, framework, raising=False)
    with pytest.raises(TypeError) as error:
        lnp.decompose(model_of(f"{framework}.nn"), (1, 2))
    for words in (f"{framework}.nn.Net", "Expected", f"import {framework}", f"pip install 'lnp[{framework}]'", "numpy"):
        assert words in str(error.value)


def test_an_unknown_object():
    with pytest.raises(TypeError, match=r"tests\.made_up.Net, which no backend accepts.*numpy.*pip install"):
        lnp.decompose(model_of("tests.made_up"), (1, 2))


def test_an_unknown_pair():
    with pytest.raises(TypeError, match="items of types function, str, which no backend accepts"):
        lnp.decompose((lambda p, x: x, "parameters"), (1, 2))


def test_load():
    assert lnp.load("numpy") is lnp_numpy
    with pytest.raises(ValueError, match=r"No lnp backend for .*Expected one of jax, keras, numpy, tensorflow, torch"):
        lnp.load("cupy")


def test_only_loaded_frameworks_are_asked(monkeypatch):
    """And NumPy last: other frameworks' models may hold its arrays."""
    asked = []

    def backend(name, accepted):
        return SimpleNamespace(accepts=lambda model: asked.append(name) or accepted)

    found = {"numpy": backend("numpy", True), "torch": backend("torch", False), "absent": backend("absent", True)}
    entries = [SimpleNamespace(name=name, load=lambda name=name: found[name]) for name in found]
    monkeypatch.setattr(registry, "_entries", lambda: entries)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert registry.find(object()) is found["numpy"]
    assert asked == ["torch", "numpy"]
