"""What the public functions ask a backend for where the user does not say: defaults, and no more work than it takes."""

from __future__ import annotations

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp import api
from lnp.contract.options import Options
from lnp.spectral import spectrum

MODEL = lnp_numpy.LinearModel(weight=np.zeros((2, 1)))
BATCH = (np.ones((3, 2)), np.ones((3, 1)))


@pytest.mark.parametrize("function", [lnp.decompose, lnp.cross_response, lnp.spectrum])
def test_one_default_everywhere(function, monkeypatch):
    asked = []
    for module in (api, spectrum):
        monkeypatch.setattr(module, "evaluate", lambda run, model, batches, options: asked.append((run, options)))
    for module, name in ((api, "explained"), (api, "finished"), (spectrum, "from_lanczos")):
        monkeypatch.setattr(module, name, lambda result: None)
    function(MODEL, *[BATCH] * (2 if function is lnp.cross_response else 1))
    ((run, options),) = asked
    assert (run.estimator, run.rtol, run.max_probes, options.seed) == ("auto", 0.01, 64, 0)


@pytest.mark.parametrize("function", [lnp.measured_loss_change, lnp.predicted_loss_change])
def test_a_loss_change_takes_no_samples_apart(function, monkeypatch):
    asked: list[Options] = []
    monkeypatch.setattr(api, "evaluate", lambda run, model, batches, options, **operands: asked.append(options))
    function(MODEL, BATCH, learning_rate=0.1)
    assert [options.split for options in asked] == [False]


def test_a_spectrum_has_no_sums_over_the_population(monkeypatch):
    asked: list[Options] = []
    monkeypatch.setattr(spectrum, "evaluate", lambda run, model, batches, options: asked.append(options))
    monkeypatch.setattr(spectrum, "from_lanczos", lambda result: None)
    lnp.spectrum(MODEL, BATCH)
    assert [options.population for options in asked] == [False]
