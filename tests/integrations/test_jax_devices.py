"""Batches and parameters that several devices share, in one process and in two: the same numbers as on one device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHAPES = {"6,64", "64", "64,24", "24,4"}
"""Of the parameters in jax_devices.py, whole."""
LIMIT = 240
"""Seconds until processes count as waiting for each other."""


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """What eight devices of one process found, by case."""
    path = tmp_path_factory.mktemp("devices") / "found.json"
    command = [sys.executable, str(HERE / "jax_devices.py"), str(path)]
    ran = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(path.read_text())


def agree(found, expected, tolerance):
    numbers = [name for name, value in expected.items() if isinstance(value, float)]
    return all(math.isclose(found[name], expected[name], rel_tol=tolerance) for name in numbers)


@pytest.mark.parametrize("case", ["exact", "per_sample", "microbatch"])
def test_sharded_batches_and_parameters_give_the_numbers_of_one_device(devices, case):
    """Constraints inside of the network reorder sums: rounding, which is no interaction."""
    found, expected = devices[f"{case}, float64"].values()
    assert agree(found, expected, 1e-12)
    assert found["notes"] == expected["notes"]
    assert found["estimator"] == expected["estimator"]


def test_in_single_precision(devices):
    found, expected = devices["exact, float32"].values()
    assert agree(found, expected, 1e-6)
    assert found["notes"] == []


def test_samples_that_meet_are_still_found(devices):
    found, expected = devices["samples that meet"].values()
    assert agree(found, expected, 1e-12)
    assert "interact" in found["notes"][0]


def test_parameters_are_gathered_where_the_plain_step_gathers_them_alone(devices):
    programs = devices["programs"]
    for gathered in programs["measured"]:
        assert set(gathered) & SHAPES <= set(programs["step"])


def test_devices_keep_their_own_samples_alone(devices):
    assert devices["programs"]["all_samples"] == [False, False]
