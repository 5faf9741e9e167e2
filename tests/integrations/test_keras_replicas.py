"""Keras where several devices train: `tf.distribute` on TensorFlow, its own distribution on JAX."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest

HERE = Path(__file__).parent


def ran(script, *names, folder):
    """What a process of its own found, by case: devices are counted before a framework starts."""
    path = folder / "found.json"
    process = subprocess.run([sys.executable, str(HERE / script), str(path), *names], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(path.read_text())


of_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a strategy of TensorFlow's")


@of_tensorflow
def test_two_replicas_measure_the_whole_batch(tmp_path):
    """Wherever it is asked for."""
    measured, expected = ran("tensorflow_replicas.py", "layers", folder=tmp_path)["layers"].values()
    for where in ("outside", "in scope", "arrays in scope"):
        assert measured[where] == pytest.approx(expected["whole"], rel=1e-6)
    assert measured["by replicas"] == [pytest.approx(expected[half], rel=1e-6) for half in ("first", "second")]


@of_tensorflow
def test_fit_with_two_replicas_goes_on_as_without_the_callback(tmp_path):
    found = ran("tensorflow_replicas.py", "fit", folder=tmp_path)["fit"]
    assert found["same"]
    assert found["rates"][0] == pytest.approx(found["first"], rel=1e-6)
    assert len(found["rates"]) == 4


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Keras distributes on JAX alone")
def test_keras_s_distribution(tmp_path):
    """Data parallel and model parallel: the numbers of one device, and fit goes on as without the callback."""
    found = ran("keras_devices.py", folder=tmp_path)
    one = found.pop("one device")
    for case in found.values():
        assert case["factors"] == pytest.approx(one["factors"], rel=1e-6)
        assert case["notes"] == []
        assert case["same"]
        assert case["rates"] == pytest.approx(one["rates"], rel=1e-6)
    assert [case["samples_of_a_device"] for case in found.values()] == [2, 4]
    assert [case["numbers_of_a_device"] for case in found.values()] == [64, 32]
