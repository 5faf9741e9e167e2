"""Batches and parameters that several devices share, in one process and in two: the same numbers as on one device."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lnp

HERE = Path(__file__).parent
SHAPES = {"6,64", "64", "64,24", "24,4"}
"""Of the parameters in jax_devices.py, whole."""
FACTORS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")
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


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes found, and the folder of their files."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    commands = [[sys.executable, str(HERE / "jax_processes.py"), str(rank), port, str(folder)] for rank in range(2)]
    env, pipes = {**os.environ, "JAX_PLATFORMS": "cpu"}, {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    started = [subprocess.Popen(command, env=env, text=True, **pipes) for command in commands]
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], folder


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


def test_explicit_axes_are_measured_or_refused(devices):
    case = devices["explicit axes"]
    assert agree(case["found"], case["expected"], 1e-12)
    assert case["found"]["notes"] == []
    assert "the network does not run with automatic ones (ValueError" in case["naming"]
    assert "lnp was called inside of a compiled function" in case["compiled"]
    assert "jax.set_mesh has entered it" in case["kernel"]


def test_parameters_are_gathered_where_the_plain_step_gathers_them_alone(devices):
    programs = devices["programs"]
    for gathered in programs["measured"]:
        assert set(gathered) & SHAPES <= set(programs["step"])


def test_devices_keep_their_own_samples_alone(devices):
    assert devices["programs"]["all_samples"] == [False, False]


@pytest.mark.parametrize("estimator", ["exact", "per_sample"])
def test_devices_measure_together_inside_of_shard_map(devices, estimator):
    case = devices["in shard_map"]
    whole = case["expected"][estimator][:5]
    assert case["together"][estimator] == [pytest.approx(whole, rel=1e-12)] * 4


def test_each_device_measures_its_own_part_inside_of_shard_map(devices):
    case = devices["in shard_map"]
    assert case["own"] == [pytest.approx(own, rel=1e-12) for own in case["expected of own"]]


def test_inside_of_shard_map_nothing_is_wrong_in_silence(devices):
    case = devices["in shard_map"]
    assert all(math.isnan(own[FACTORS.index("chi_net")]) for own in case["samples that meet"])
    assert "The network talks to other devices inside of jax.shard_map (by psum)" in case["network"]
    assert "The loss talks to other devices" in case["loss"]
    assert "group='rows' is no axis that is bound here" in case["axis"]


def test_the_same_line_in_two_processes_gives_the_numbers_of_one(processes):
    for found in processes[0]:
        assert found["found"] == pytest.approx(found["expected"], rel=1e-12)
        assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-12)
    assert processes[0][0]["found"] == processes[0][1]["found"]


def test_two_processes_refuse_alike(processes):
    for found in processes[0]:
        assert "lnp.kernel and lnp.linear_operator work in one" in found["kernel"]
        assert "labels outside [0, 3)" in found["labels"]


def test_all_processes_measure_for_a_tracker_and_one_keeps_the_rows(processes):
    (first, second), folder = processes
    assert first["tracked"] == second["tracked"] == first["found"][FACTORS.index("rate")]
    history = lnp.History.read(folder / "run.jsonl")
    assert history["step"].tolist() == [0]
    assert history["update/measured"][0] < 0


def test_a_process_that_measures_without_the_other_does_not_wait_for_ever(processes):
    first, second = processes[0]
    assert "1 seconds have passed without all of them measuring" in first["missed"]["alone"]
    assert first["missed"]["again"] == second["missed"]["again"] == first["found"]
