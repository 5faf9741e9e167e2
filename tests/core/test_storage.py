"""Records survive: kills, torn lines, full disks, other writers, numbers that are not finite."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lnp.tracking import records, storage
from lnp.tracking.history import History
from lnp.tracking.names import FAMILIES, RESERVED
from lnp.tracking.storage import Appender

KILLED = Path(__file__).with_name("killed.py")
VALUES = st.floats() | st.integers(-(2**60), 2**60) | st.booleans() | st.none() | st.text().filter(
    lambda text: text not in records.NONFINITE
)  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_hundred_kills_lose_nothing_but_the_record_in_flight(tmp_path):
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(KILLED), str(tmp_path / "run.jsonl"), "100"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["lost"] == 0
    assert seen["extra"] <= 1  # written, and killed before it could say so
    assert seen["total"] > 100  # more than one record for each life, however busy the machine is


def is_reserved(name):
    return name in RESERVED or name.startswith(FAMILIES)


@given(st.dictionaries(st.text(), VALUES), st.integers(0, 2**63 - 1))
def test_records_come_back_as_they_were(record, step):
    record = {"step": step, **{name: value for name, value in record.items() if not is_reserved(name)}}
    line = records.encode(record)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert records.is_sealed(line[:-1])
    back = {n: records.NONFINITE.get(v, v) if isinstance(v, str) else v for n, v in records.decode(line).items()}
    assert list(back) == list(record)
    assert all(same(back[name], value) for name, value in record.items())


def same(a, b):
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def test_numbers_of_libraries_become_pythons():
    line = records.encode({"a": np.float32(0.5), "b": np.int64(3), "c": np.array(2.0), "d": np.float64("inf")})
    found = json.loads(line)
    assert len(found.pop("crc32")) == 8
    assert found == {"a": 0.5, "b": 3, "c": 2.0, "d": "Infinity"}


def test_what_is_no_number_is_refused():
    with pytest.raises(TypeError, match="Expected numbers, texts"):
        records.encode({"a": [1, 2]})
    with pytest.raises(TypeError, match="type ndarray"):
        records.encode({"a": np.ones(3)})
    with pytest.raises(ValueError, match="Choose another name"):
        records.encode({"crc32": 1.0})


@pytest.mark.parametrize("sealed", [True, False])
def test_sound_lines_are_read_by_one_call(sealed, monkeypatch):
    rows = [{"step": 0, "loss": 0.5}, {"step": 1}]
    lines = [records.encode(row)[:-1] if sealed else json.dumps(row).encode() for row in rows]
    monkeypatch.setattr(records, "decode", lambda line: pytest.fail("it is read by itself"))
    assert records.decode_all(lines, False) == (rows, sealed)


def test_all_numbers_that_are_not_finite_fit_into_one_column():
    assert records.fits([{"step": step, "loss": text} for step, text in enumerate(records.NONFINITE)])


def test_a_last_line_that_lacks_its_newline_alone_is_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, [0, 1, 2])
    path.write_bytes(path.read_bytes()[:-1])
    assert History.read(path)["step"].tolist() == [0, 1, 2]
    write(path, [3])
    assert History.read(path)["step"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("cut", [2, 10, 17, 40])
def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path, cut):
    path = tmp_path / "run.jsonl"
    write(path, [0, 1, 2])
    path.write_bytes(path.read_bytes()[:-cut])
    assert History.read(path)["step"].tolist() == [0, 1]
    write(path, [3])
    assert History.read(path)["step"].tolist() == [0, 1, 3]
    assert path.read_bytes().count(b"\n") == 3


def test_a_file_with_nothing_but_a_torn_line_is_empty(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"step": 0')
    assert len(History.read(path)) == 0
    write(path, [5])
    assert History.read(path)["step"].tolist() == [5]


def test_damaged_lines_in_the_middle_are_left_out_with_a_warning(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"step": 0}\n\x00\x00\x00\n[1]\n{"step": 1}\n')
    with pytest.warns(UserWarning, match="2 lines hold no record"):
        assert History.read(path)["step"].tolist() == [0, 1]


def test_a_small_chunk_reads_the_same(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    write(path, range(50))
    whole = History.read(path)["step"].tolist()
    monkeypatch.setattr(storage, "CHUNK", 7)
    assert History.read(path)["step"].tolist() == whole == list(range(50))


def test_lines_are_numbered_through_the_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    write(path, range(5))
    path.write_bytes(path.read_bytes() + b"damaged\n" + records.encode({"step": 9}))
    monkeypatch.setattr(storage, "CHUNK", 30)
    with pytest.warns(UserWarning, match="of 7; the first is line 6"):
        assert History.read(path)["step"].tolist() == [*range(5), 9]


def test_one_damaged_line_of_a_tracker_makes_a_file_a_tracker_s(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'a comment\n{"step": 3, "chi_pos": 0.2\n')
    with pytest.warns(UserWarning, match="2 lines hold no record"):
        assert len(History.read(path)) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_file_is_for_reading_and_writing_alone(tmp_path):
    before = os.umask(0)
    try:
        write(tmp_path / "run.jsonl", [0])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run.jsonl").stat().st_mode) == 0o666


def test_a_file_may_be_closed_twice(tmp_path):
    file = Appender(tmp_path / "run.jsonl")
    for _ in range(2):
        file.close()


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL"])
def test_a_file_system_without_locks_is_told_of(error, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(getattr(errno, error), "no locks")

    pytest.importorskip("fcntl")
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="this file system has no locks"):
        write(tmp_path / "run.jsonl", [0])
    assert History.read(tmp_path / "run.jsonl")["step"].tolist() == [0]


def test_a_second_process_is_refused_until_the_first_is_done(tmp_path):
    path = tmp_path / "run.jsonl"
    first = Appender(path)
    code = (
        "from lnp.tracking.storage import Appender\n"
        f"try: Appender({str(path)!r})\nexcept BlockingIOError: print('refused')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "refused\n"
    first.close()
    Appender(path).close()


def test_a_later_writer_of_a_process_closes_the_earlier_one_of_the_same_file(tmp_path):
    path, elsewhere = tmp_path / "run.jsonl", Appender(tmp_path / "other.jsonl")
    first = Appender(path)
    with pytest.warns(UserWarning, match="was still open in an earlier tracker of this process"):
        second = Appender(tmp_path / "." / "run.jsonl")
    with pytest.raises(RuntimeError, match="a later tracker of this process writes to"):
        first.append({"step": 0})
    second.append({"step": 1})
    elsewhere.append({"step": 2})
    first.close()
    assert [record["step"] for block in storage.read(path) for record in block] == [1]
    second.close(), elsewhere.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_copy_may_not_write(tmp_path, monkeypatch):
    file = Appender(tmp_path / "run.jsonl")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="another process"):
        file.append({"step": 0})
    monkeypatch.undo()
    file.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_copy_that_lets_go_leaves_the_lock_to_the_one_that_writes(tmp_path):
    path = tmp_path / "run.jsonl"
    file = Appender(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads, of which the child uses none
        child = os.fork()
    if child == 0:
        try:
            file.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with open(path, "ab") as other:
        with pytest.raises(BlockingIOError):
            storage.lock(other.fileno())
        file.close()
        assert storage.lock(other.fileno())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_copy_that_stays_does_not_keep_the_lock(tmp_path):
    file, (end, begin) = Appender(tmp_path / "run.jsonl"), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads, of which the child uses none
        child = os.fork()
    if child == 0:
        os.close(begin)
        os.read(end, 1)
        os._exit(0)
    try:
        file.close()
        with open(tmp_path / "run.jsonl", "ab") as other:
            assert storage.lock(other.fileno())
    finally:
        os.close(end), os.close(begin)
        os.waitpid(child, 0)


def test_a_lock_that_waits_locks_too(tmp_path):
    with open(tmp_path / "lock", "wb") as first, open(tmp_path / "lock", "wb") as second:
        assert storage.lock(first.fileno(), wait=True)
        with pytest.raises((BlockingIOError, PermissionError)):
            storage.lock(second.fileno())


def test_folders_of_the_path_are_made(tmp_path):
    path = tmp_path / "runs" / "width3" / "run.jsonl"
    write(path, [0, 1])
    assert History.read(path)["step"].tolist() == [0, 1]


def test_a_full_disk_leaves_the_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    file = Appender(path)
    file.append({"step": 0})
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:4]))
    with pytest.raises(OSError, match="disk full"):
        file.append({"step": 1})
    monkeypatch.undo()
    file.append({"step": 2})
    file.close()
    assert History.read(path)["step"].tolist() == [0, 2]


def test_fsync_waits_for_the_disk_at_each_record(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    for fsync, expected in (((), 0), ((False,), 0), ((True,), 3)):
        calls.clear()
        file = Appender(tmp_path / f"{fsync}.jsonl", *fsync)
        for step in range(3):
            file.append({"step": step})
        assert len(calls) == expected
        file.close()


def write(path, steps):
    file = Appender(path)
    for step in steps:
        file.append({"step": step, "loss": 0.5})
    file.close()


def test_closing_waits_for_the_disk(tmp_path, monkeypatch):
    calls: list[int] = []
    file = Appender(tmp_path / "run.jsonl")
    file.append({"step": 0})
    monkeypatch.setattr(os, "fsync", calls.append)
    file.close()
    assert len(calls) == 1
