"""Two processes that train together: what cannot be measured is refused in both alike, none waits for the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).with_name("torch_ranks.py")
LIMIT = 240
"""Seconds until two processes count as waiting for each other."""
STEPS = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process came to, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    commands = [[sys.executable, str(RANKS), str(rank), str(folder)] for rank in range(2)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


WAYS = [
    *(("tensor parallel", way) for way in ("step", "shared")),
    *(("FSDP2", way) for way in ("step", "shared")),
]
"""In which one process measures alone, and models that it cannot measure."""


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_sharded_models_are_told_of_and_trained_as_without_a_tracker(ranks, kind, way):
    for rank, cases in enumerate(ranks):
        found = cases[f"{kind}, {way}, warned"]
        assert found["equal"], "the run with a tracker ends elsewhere"
        assert found["moved"]
        assert found["rows"] == 0
        assert len(found["told"]) == (rank == 0)
    assert "sharded" in ranks[0][f"{kind}, {way}, warned"]["told"][0]


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_sharded_models_raise_in_every_process(ranks, kind, way):
    errors = [cases[f"{kind}, {way}, raised"]["error"] for cases in ranks]
    assert errors[0] == errors[1]
    assert "sharded" in errors[0]


@pytest.mark.parametrize("way", ["observe", "step"])
def test_a_measurement_that_fails_in_one_process_does_not_stop_the_other(ranks, way):
    for rank, cases in enumerate(ranks):
        found = cases[f"data parallel, {way}, warned"]
        assert found["equal"]
        assert found["moved"]
        assert len(found["told"]) == (rank == 0)


@pytest.mark.parametrize("way", ["observe", "step", "shared"])
def test_a_network_that_talks_to_other_processes_does_not_wait_for_them(ranks, way):
    for rank, cases in enumerate(ranks):
        found = cases[f"talking, {way}, warned"]
        assert found["equal"]
        assert found["moved"]
        assert len(found["told"]) == (rank == 0)
    assert "talks to other processes" in ranks[0][f"talking, {way}, warned"]["told"][0]


@pytest.mark.parametrize("kind", ["FSDP2, observe", "tensor parallel, observe", "data parallel, group"])
def test_all_processes_measure_and_the_first_keeps_the_rows(ranks, kind):
    found = [cases[f"{kind}, measured"] for cases in ranks]
    assert [case["rows"] for case in found] == [STEPS, 0]
    assert all(case["equal"] and case["moved"] and not case["told"] for case in found)
    assert found[0]["samples"] == [8.0 if kind.startswith("tensor") else 16.0] * STEPS


@pytest.mark.parametrize("kind", ["FSDP2", "tensor parallel"])
def test_a_failure_of_one_process_is_told_by_the_first(ranks, kind):
    found = [cases[f"{kind}, observe, one fails"] for cases in ranks]
    assert all(case["equal"] and case["moved"] for case in found)
    assert [len(case["told"]) for case in found] == [1, 0]
    assert "lnp failed in process 1 of 2" in found[0]["told"][0]
    assert "OutOfMemoryError: no room" in found[0]["told"][0]


def test_a_budget_of_time_is_none_for_several_processes(ranks):
    found = [cases["data parallel, budget"] for cases in ranks]
    assert all(case["equal"] and case["moved"] for case in found)
    assert "which each process spends in its own way" in found[0]["told"][0]


def test_data_parallel_models_are_measured_in_the_first_process(ranks):
    found = [cases["data parallel, observe, measured"] for cases in ranks]
    assert [case["rows"] for case in found] == [STEPS, 0]
    assert all(case["equal"] and case["moved"] and not case["told"] for case in found)
