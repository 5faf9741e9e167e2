"""The examples of the docstrings run and say the truth."""

import doctest
import importlib
import pkgutil

import pytest

import lnp
import lnp_numpy

SKIPPED = {"lnp.__main__"}
MODULES = [lnp, lnp_numpy]
NAMES = sorted(
    info.name
    for package in MODULES
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if info.name not in SKIPPED
)


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0


@pytest.mark.parametrize("name", ["decompose", "cross_response", "measured_loss_change", "predicted_loss_change"])
def test_functions_have_an_example(name):
    assert ">>>" in getattr(lnp, name).__doc__
