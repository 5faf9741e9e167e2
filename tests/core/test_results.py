"""What several processes write of one run's checkpoints they write one after another."""

from __future__ import annotations

import threading

import pytest

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


def test_a_folder_without_settings_does_not_make_a_file_one_of_checkpoints(tmp_path):
    (tmp_path / "run.jsonl").write_text("mine")
    (tmp_path / "run.jsonl.parts").mkdir()
    with pytest.raises(FileExistsError, match="was not made of checkpoints"):
        Results(tmp_path / "run.jsonl", {})
    assert (tmp_path / "run.jsonl").read_text() == "mine"
