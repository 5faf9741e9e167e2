"""What several processes write of one run's checkpoints they write one after another."""

from __future__ import annotations

import os
import stat
import threading
import types

import pytest

from lnp.checkpoints.fingerprints import digest
from lnp.checkpoints.results import Results
from lnp.tracking.storage import lock


@pytest.mark.parametrize("name", ["settings.lock", "history.lock"])
def test_files_that_another_process_is_at_are_waited_for(name, tmp_path):
    path = tmp_path / "run.jsonl"
    Results(path, {})
    go_on = threading.Thread(target=lambda: Results(path, {}).write_history(lambda parts: []), daemon=True)
    with open(tmp_path / "run.jsonl.parts" / name, "w") as file:
        lock(file.fileno())
        go_on.start()
        go_on.join(0.2)
        assert go_on.is_alive()
    go_on.join(20)
    assert not go_on.is_alive()


def test_a_step_that_another_process_is_at_is_not_waited_for(tmp_path):
    results, found = Results(tmp_path / "run.jsonl", {}), []

    def claim():
        with results.claim(4) as own:
            found.append(own)

    with open(tmp_path / "run.jsonl.parts" / "4.lock", "w") as file:
        lock(file.fileno())
        thread = threading.Thread(target=claim, daemon=True)
        thread.start()
        thread.join(5)
        assert found == [False]
    claim()
    assert found == [False, True]


def test_an_object_that_has_a_shape_and_no_numbers_is_told_by_its_type():
    class Shaped:
        shape = (2,)

    assert digest([Shaped()]) == digest([Shaped()]) != digest([None])


def test_a_folder_without_settings_does_not_make_a_file_one_of_checkpoints(tmp_path):
    (tmp_path / "run.jsonl").write_text("mine")
    (tmp_path / "run.jsonl.parts").mkdir()
    with pytest.raises(FileExistsError, match="was not made of checkpoints"):
        Results(tmp_path / "run.jsonl", {})
    assert (tmp_path / "run.jsonl").read_text() == "mine"


def test_a_history_is_left_for_later_until_writing_takes_a_twentieth_of_the_time(tmp_path, monkeypatch):
    times = iter([100.0, 100.5, 110.4, 110.8, 111.0, 112.0, 113.0])
    monkeypatch.setattr("lnp.checkpoints.results.time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    results = Results(tmp_path / "run.jsonl", {})
    written = [results.write_history(lambda parts: [], in_time=in_time) for in_time in (False, True, True, False)]
    assert [history is not None for history in written] == [True, False, True, True]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_files_are_for_reading_and_writing_alone(tmp_path):
    before = os.umask(0)
    try:
        Results(tmp_path / "run.jsonl", {}).write_history(lambda parts: [])
    finally:
        os.umask(before)
    files = [*tmp_path.glob("*.jsonl"), *tmp_path.glob("*.parts/*")]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666}
