"""What a tracker is pointed at: other people's files, pipes, locks, names that steer a terminal."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.cli import main
from lnp.tracking import records
from lnp.tracking.history import History

MODEL, BATCH = lnp_numpy.LinearModel(weight=np.ones((2, 1))), (np.eye(2), np.zeros((2, 1)))
D = lnp.decompose(MODEL, BATCH, by_layer=True)
OTHERS = {
    "minified JSON": json.dumps({"lr": 0.1, "layers": [1, 2, 3]}).encode(),
    "indented JSON": json.dumps({"lr": 0.1, "layers": [1, 2, 3]}, indent=2).encode(),
    "JSON that begins with a step": json.dumps({"step": 3, "optimizer": {"lr": 0.1}}).encode(),
    "a pickle": pickle.dumps({"weights": list(range(500))}),
    "bytes": bytes(range(256)) * 300,
    "text": b"# notes\nfirst\nlast line without newline",
    "text with a last newline": b"# notes\nfirst\n",
    "one word": b"step",
    "a newline": b"\n",
    "records of something else": b'{"prompt": "a", "answer": "b"}\n{"prompt": "c"',
    "whole records of something else": b'{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n',
    "steps of another program": b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n',
    "steps of another program, torn": b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo',
    "logs with times": b'{"step": 1, "time": 17.5, "loss": 0.5, "lr": 0.1}\n',
    "a table": b"step,loss\n1,0.5\n",
    "a list of steps": b'[{"step": 1, "chi_pos": 0.5}]',
    "zeros and text": b"\x00\x00\x00important\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_something_else_is_refused_before_a_byte_of_it_changes(name, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(OTHERS[name])
    before = path.stat()
    tracker = lnp.Tracker(path, schedule=1)
    with pytest.warns(UserWarning, match="holds something else"):
        assert [tracker.observe(step, MODEL, BATCH) for step in range(2)] == [None, None]
    with pytest.raises(FileExistsError, match="Choose another path"):
        lnp.Tracker(path, schedule=1, on_error="raise").observe(0, MODEL, BATCH)
    assert path.read_bytes() == OTHERS[name]
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("content", [b"", b'{"step": 0, "time": 1', b'{"st', b"\x00" * 40])
def test_what_is_empty_or_torn_is_begun_anew(content, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with lnp.Tracker(path, schedule=1, on_error="raise") as tracker:
        tracker.observe(0, MODEL, BATCH)
    assert History.read(path)["step"].tolist() == [0]


def test_a_line_that_somebody_left_at_the_end_is_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(records.encode({"step": 0, "chi_pos": 0.5}) + b"restarted by hand")
    with lnp.Tracker(path, schedule=1, on_error="raise") as tracker, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracker.observe(1, MODEL, BATCH)
    assert b"restarted by hand\n" in path.read_bytes()
    with pytest.warns(UserWarning, match="the first is line 2"):
        assert History.read(path)["step"].tolist() == [0, 1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "a link to nothing", "a link to a pipe"])
def test_what_is_no_file_is_refused(kind, tmp_path):
    path = tmp_path / "x"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path = Path(os.devnull)
    elif kind == "a link to nothing":
        path.symlink_to(tmp_path / "nowhere")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    what = kind.replace("a link to a", "a")
    with pytest.raises(OSError, match=f"is {what}"):
        lnp.Tracker(path, schedule=1, on_error="raise").observe(0, MODEL, BATCH)
    with pytest.raises(OSError, match="No such file" if "nothing" in kind else f"is {what}"):
        History.read(path)
    assert not (tmp_path / "nowhere").exists()


def test_the_lock_ends_with_the_tracker(tmp_path):
    path = tmp_path / "run.jsonl"
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for step in range(3):
        tracker = lnp.Tracker(path, schedule=1, on_error="raise")
        tracker.observe(step, MODEL, BATCH)
        del tracker  # never closed
        gc.collect()
    assert History.read(path)["step"].tolist() == [0, 1, 2]
    if descriptors is not None:
        assert len(os.listdir("/proc/self/fd")) <= descriptors


FORKING = """
import os, sys, time, warnings
import numpy as np, lnp, lnp_numpy
model, batch, path = lnp_numpy.LinearModel(weight=np.ones((2, 1))), (np.eye(2), np.zeros((2, 1))), sys.argv[1]
tracker = lnp.Tracker(path, schedule=1)
tracker.observe(0, model, batch)
end, begin = os.pipe()
child = os.fork()
if child == 0:  # a loader's process: it keeps a copy of the tracker, and outlives it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker.observe(1, model, batch)
    ok = "copy" in str(caught[0].message)
    os.close(begin)
    os.read(end, 1)
    os._exit(0 if ok else 3)
tracker.observe(1, model, batch)
tracker.close()
with lnp.Tracker(path, schedule=1, on_error="raise") as other:
    other.observe(2, model, batch)
print(lnp.History.read(path)["step"].tolist())
os.close(begin)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_neither_writes_nor_keeps_the_lock(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FORKING, str(tmp_path / "run.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[0, 1, 2]\n", 0), done.stderr


def test_a_restart_whose_first_record_fails_still_says_so(tmp_path, monkeypatch):
    """The mark is written with the next record: what was measured from there on leads nowhere."""
    path = tmp_path / "run.jsonl"
    with lnp.Tracker(path, schedule=1) as tracker:
        for step in range(10):
            tracker.observe(step, MODEL, BATCH)
    write = os.write
    with lnp.Tracker(path, schedule=lambda step: step != 6) as tracker:
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:4]))
        with pytest.warns(UserWarning, match="is the disk full"):
            tracker.observe(4, MODEL, BATCH)
        monkeypatch.undo()
        tracker.observe(6, MODEL, BATCH)
        tracker.observe(7, MODEL, BATCH)
    assert read_quietly(path)["step"].tolist() == [0, 1, 2, 3, 7]


def test_a_run_that_goes_back_in_one_process_says_so_in_its_file(tmp_path):
    path = tmp_path / "run.jsonl"
    with lnp.Tracker(path, schedule=1) as tracker:
        for step in range(5):
            tracker.observe(step, MODEL, BATCH)
        tracker.load_state_dict({**tracker.state_dict(), "observed": 2})
        tracker.observe(3, MODEL, BATCH)
    assert read_quietly(path)["step"].tolist() == [0, 1, 2, 3]


def test_of_several_steps_that_a_run_goes_back_to_the_file_is_told_the_first(tmp_path):
    path, due = tmp_path / "run.jsonl", set(range(6))
    with lnp.Tracker(path, schedule=lambda step: step in due) as tracker:
        for step in range(6):
            tracker.observe(step, MODEL, BATCH)
        due.clear()
        for step in (2, 3, 4, 3):
            tracker.observe(step, MODEL, BATCH)
        due.add(9)
        tracker.observe(9, MODEL, BATCH)
    assert read_quietly(path)["step"].tolist() == [0, 1, 9]


def test_a_tracker_that_was_closed_opens_its_file_again(tmp_path):
    path = tmp_path / "run.jsonl"
    tracker = lnp.Tracker(path, schedule=1)
    for step in range(2):
        tracker.observe(step, MODEL, BATCH)
        tracker.close()
    assert History.read(path)["step"].tolist() == [0, 1]


def test_a_tracker_waits_for_the_disk_where_that_is_asked_for_alone(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    for options, expected in (({}, 0), ({"fsync": True}, 2)):
        with lnp.Tracker(tmp_path / f"{expected}.jsonl", schedule=1, **options) as tracker:
            calls.clear()
            for step in range(2):
                tracker.observe(step, MODEL, BATCH)
            assert len(calls) == expected


def test_a_copy_of_an_open_tracker_opens_the_file_once_it_is_free(tmp_path):
    path = tmp_path / "run.jsonl"
    tracker = lnp.Tracker(path, schedule=1)
    tracker.observe(0, MODEL, BATCH)
    copy = pickle.loads(pickle.dumps(tracker))
    tracker.close()
    with copy:
        copy.observe(1, MODEL, BATCH)
    assert History.read(path)["step"].tolist() == [0, 1]


def read_quietly(path):
    """The history of a file of which there is nothing to say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = History.read(path)
    assert not caught, [str(warning.message) for warning in caught]
    return history


TAKEN = (
    "loss",
    "step",
    "chi_pos",
    "time",
    "estimator",
    "notes",
    "resumed",
    "layer/head/rate",
    "population/chi_pos",
    "crc32",
)


@pytest.mark.parametrize("name", TAKEN)
def test_tags_and_values_never_overwrite_what_is_measured(name, tmp_path):
    path = tmp_path / "run.jsonl"
    with pytest.raises(ValueError, match=f"named '{name}'"):
        lnp.Tracker(path, tags={name: 1.0})
    logged = []
    tracker = lnp.Tracker(path, schedule=[5], loggers=lambda values, step: logged.append(step))
    if name != "step":
        for call in (tracker.observe, tracker.measure):
            for step in (0, 5):  # also where nothing is due
                with pytest.raises(ValueError, match="Choose others"):
                    call(step, MODEL, BATCH, **{name: 1.0})
        with pytest.raises(ValueError, match="Choose others"):
            tracker.record(5, D, **{name: 1.0})
        with pytest.raises(ValueError, match="Choose others"), tracker.step(5, MODEL, BATCH, **{name: 1.0}):
            pytest.fail("the step had begun")
        with pytest.raises(ValueError, match="Choose others"):
            tracker.shared(5, MODEL, **{name: 1.0})
    assert not path.exists()
    assert not logged
    assert tracker.observe(5, MODEL, BATCH, accuracy=0.5) is not None
    assert tracker.history["accuracy"].tolist() == [0.5]


STEERING = "\x1b[2J\x1b]0;title\x07\u202eevil\x9b31m"


def test_no_control_character_reaches_a_terminal_or_a_page(tmp_path, capsys):
    folder = tmp_path / f"runs{STEERING}"
    with lnp.Tracker(folder / f"a{STEERING}.jsonl", schedule=1, tags={"note": STEERING}) as tracker:
        for step in range(3):
            tracker.observe(step, MODEL, BATCH, **{f"x{STEERING}": 1.0})
    (folder / "b.jsonl").write_bytes((folder / f"a{STEERING}.jsonl").read_bytes() + b"{}\n")
    (folder / f"empty{STEERING}.jsonl").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["compare", str(folder)]) == 0
        assert main(["compare", str(folder / f"none{STEERING}.jsonl")]) == 1
        (folder / f"other{STEERING}.jsonl").write_text("text\n")
        assert main(["compare", str(folder)]) == 1
    layers = {f"head{STEERING}": next(iter(D.layers.values()))}
    d = replace(D, layers=layers, notes=(f"a note {STEERING}",))
    history = History.read(folder / f"a{STEERING}.jsonl")
    with pytest.raises(KeyError) as error:
        history["nothing"]
    shown = [
        *capsys.readouterr(),
        *(str(w.message) for w in caught),
        str(d),
        d._repr_html_(),
        repr(tracker),
        repr(history),
    ]
    assert "a\\x1b[2J" in shown[0]
    assert len({str(warning.message) for warning in caught}) == 1
    for text in (*shown, error.value.args[0]):
        assert not set(text) & set("\x1b\x07\x9b\u202e"), text
