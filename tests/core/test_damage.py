"""Files that were damaged: right numbers, or a warning, or an error that names the file; never a raw one."""

from __future__ import annotations

import contextlib
import json
import random
import warnings

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.runs.curves import curve, summary
from lnp.tracking import records, storage
from lnp.tracking.history import History
from lnp.tracking.storage import Appender

ROWS = [
    {
        "step": 10 * i,
        "time": 1e9 + i,
        "loss": 1 / (1 + i),
        "chi_pos": 0.5 - i / 1000,
        "estimator": "exact",
        "wide": i % 2 == 0,
    }
    for i in range(25)
]
HUGE = "1" + "0" * 400
BY_STEP = {row["step"]: row for row in ROWS}
MODEL, BATCH = lnp_numpy.LinearModel(weight=np.ones((2, 1))), (np.eye(2), np.zeros((2, 1)))


class Named(Exception):
    """An error that names the file."""


@pytest.fixture(params=["json", "orjson"])
def reader(request, monkeypatch):
    """With both parsers, where they are installed."""
    if request.param == "json":
        monkeypatch.setattr(records, "parser", lambda: json.loads)
    else:
        pytest.importorskip("orjson")
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


def write(path, rows=ROWS):
    path.write_bytes(b"".join(map(records.encode, rows)))


def opened(path):
    """(The history or None, whether something was said)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = None
        with contextlib.suppress(Named):
            try:
                history = History.read(path)
            except (ValueError, OSError) as error:
                raise (Named if str(path) in str(error) else AssertionError)(str(error)) from error
    if history is None:
        return None, True
    assert all(str(path) in str(warning.message) for warning in caught)
    assert len(caught) <= 2  # lines that are none, and records that go back
    return history, bool(caught)


def used(history):
    """Everything that is made of a history raises nothing but what names its reason."""
    history.rows(), history.table(), history.by_layer(), repr(history)
    if len(history):
        summary(history)
        curve(history, "chi_pos")


def check(history, said, use=True):
    """Every row is one that was written, with all that was written; a row is missing only where something is said."""
    if history is None:
        return
    steps = history["step"].tolist() if len(history) else []
    for row in history.rows():
        assert {name: row.get(name) for name in BY_STEP[row["step"]]} == BY_STEP[row["step"]]
    assert said or steps == list(BY_STEP)
    assert len(steps) >= len(ROWS) - 2
    if use:
        used(history)


def test_a_thousand_flipped_bits(path, reader):
    write(path)
    whole = path.read_bytes()
    drawn = random.Random(0)
    for number in range(1000 if reader == "json" else 200):
        data = bytearray(whole)
        data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        path.write_bytes(data)
        check(*opened(path), use=number % 20 == 0)


def test_a_flipped_bit_without_a_checksum_hides_no_other_record_in_silence(path):
    """Files of before had none: a number that is another one cannot be known; rows that vanish are told."""
    lines = [b'{"step": %d, "loss": 0.5, "chi_pos": 0.5}\n' % (10 * i) for i in range(60)]
    whole, start = b"".join(lines), len(b"".join(lines[:30]))
    for at in range(start, start + len(b'{"step": 300,')):
        for bit in range(8):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            history, said = opened(path)
            lost = 600 if history is None else len(set(range(0, 600, 10)) - set(history["step"].tolist()))
            assert said or lost <= 1


def test_all_truncations(path):
    write(path, ROWS[:4])
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = whole[: size + 1].count(b"\n")  # a line that lacks its newline alone is one
        history, said = opened(path)
        assert (len(history), said) == (complete, False)
        Appender(path).close()
        assert path.read_bytes() == b"".join(map(records.encode, ROWS[:complete]))


def test_two_thousand_fuzzed_files(path, reader):
    """Pieces of lines cut out, doubled, exchanged, overwritten: no raw error, and no row that was not written.

    The first line is sound: before it, a line may be one of earlier versions, which had no checksum.
    """
    drawn = random.Random(1)
    lines = [records.encode(row) for row in ROWS[:6]]
    pieces = [
        b"{}",
        b"\x00" * 9,
        b"[1, 2]",
        b"null",
        b'{"step": ',
        b"\n",
        b"\xff\xfe",
        b"1e999",
        b'"',
        b"NaN",
        b"\r\n",
        b"{" * 30,
    ]
    for number in range(2000 if reader == "json" else 200):
        data = b"".join(drawn.sample(lines[1:], drawn.randint(1, 5)))
        for _ in range(drawn.randint(1, 4)):
            at, size = drawn.randrange(len(data) + 1), drawn.choice([0, 1, 5, 40])
            data = data[:at] + drawn.choice([b"", *pieces, drawn.choice(lines), drawn.randbytes(3)]) + data[at + size :]
        path.write_bytes(lines[0] + data)
        history, _ = opened(path)
        if history is not None:
            for row in history.rows():
                assert {name: row.get(name) for name in BY_STEP[row["step"]]} == BY_STEP[row["step"]]
            if number % 20 == 0:
                used(history)


NO_RECORDS = {
    "an empty object": b"{}",
    "a comment": b'{"comment": "restarted with lr 0.1"}',
    "no step": b'{"Step": 3000, "loss": 0.1}',
    "a step of null": b'{"step": null, "loss": 1}',
    "a step of nan": b'{"step": NaN}',
    "a step of nan, as text": b'{"step": "NaN"}',
    "a step of text": b'{"step": "last"}',
    "a step of infinity": b'{"step": 1e999}',
    "a step that is no integer": b'{"step": 1.5}',
    "a negative step": b'{"step": -1}',
    "a step that is true": b'{"step": true}',
    "a step beyond 64 bits": b'{"step": 9223372036854775808}',
    "a step of 400 digits": b'{"step": 1' + b"0" * 400 + b"}",
    "a step of 5000 digits": b'{"step": 1' + b"0" * 5000 + b"}",
    "a loss of 400 digits": b'{"step": 3000, "loss": 1' + b"0" * 400 + b"}",
    "a loss that is text": b'{"step": 3000, "loss": "low", "chi_pos": 0.5}',
    "a position that is true": b'{"step": 3000, "chi_pos": true}',
    "a layer's list": b'{"step": 3000, "layer/a/chi_net": [1]}',
    "a nested value": b'{"step": 3000, "tag": {"a": 1}}',
    "deep nesting": b'{"step": 3000, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a character": b'{"step": 3000, "tag": "\\ud800"}',
    "no characters": b'{"step": 3000, "tag": "\xff"}',
    "a mark of text": b'{"step": 3000, "resumed": "yes"}',
    "a list": b"[3000]",
    "a number": b"3000",
    "zeros": b"\x00" * 100,
    "a wrong checksum": b'{"step": 3000, "loss": 0.5, "crc32": "00000000"}',
    "two objects": b'{"step": 3000}{"step": 3001}',
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("place", [0, 12, 25])
@pytest.mark.parametrize("name", NO_RECORDS)
def test_a_line_that_is_no_record_hides_no_other_and_stops_no_resume(name, place, sealed, path):
    lines = [records.encode(row) if sealed else json.dumps(row).encode() + b"\n" for row in ROWS]
    path.write_bytes(b"".join([*lines[:place], NO_RECORDS[name] + b"\n", *lines[place:]]))
    with pytest.warns(UserWarning, match=f"{path}: 1 lines hold no record.*of 26.*the first is line {place + 1}"):
        history = History.read(path)
    assert history["step"].tolist() == list(BY_STEP)
    used(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with lnp.Tracker(path, schedule=1, on_error="raise") as tracker:
            tracker.observe(3000, MODEL, BATCH)
        assert History.read(path)["step"].tolist() == [*BY_STEP, 3000]


def test_lines_that_other_programs_wrote_anew(path):
    """jq and pandas write numbers, spaces and order of digits in other ways; the checksum is of what the line means."""
    compact = (json.dumps(json.loads(records.encode(row)), separators=(",", ":")) + "\r\n" for row in ROWS)
    path.write_bytes("".join(compact).encode())
    check(*opened(path))
    path.write_text(
        "".join(json.dumps({"step": float(row["step"]), "resumed": None, "loss": row["loss"]}) + "\n" for row in ROWS)
    )
    history, said = opened(path)
    assert (history["step"].tolist(), said) == (list(BY_STEP), False)
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(map(records.encode, ROWS)))  # a mark that editors put first
    check(*opened(path))


def test_a_line_that_has_lost_its_seal_is_left_out(path):
    whole = records.encode({"step": 1, "chi_pos": 0.25})
    unsealed = whole[: whole.index(b', "crc32"')] + b"}\n"
    path.write_bytes(records.encode({"step": 0, "chi_pos": 0.5}) + unsealed)
    with pytest.warns(UserWarning, match="1 lines hold no record, or a damaged one.*first is line 2"):
        assert History.read(path)["step"].tolist() == [0]


@pytest.mark.parametrize(
    ("values", "kept", "told"),
    [
        (["1", HUGE, "0.5", f"-{HUGE}", '"one"', "null"], [1, 0.5, "one", None], "2 lines hold no record.*is line 2"),
        ([f"-{HUGE}", "0.5", "1"], [0.5, 1], "1 lines hold no record.*is line 1"),
    ],
    ids=["large and small", "small"],
)
def test_a_value_beyond_all_floats_leaves_out_its_line_alone(path, values, kept, told):
    path.write_text("".join(f'{{"step": {step}, "a": {value}}}\n' for step, value in enumerate(values)))
    with pytest.warns(UserWarning, match=told):
        assert History.read(path)["a"].tolist() == kept


def test_values_of_several_types_in_one_column_are_no_damage(path):
    rows = [{"step": 0, "a": 1}, {"step": 1, "a": "one"}, {"step": 2, "a": None}, {"step": 3, "a": 2.5}]
    write(path, rows)
    history, said = opened(path)
    assert (history.rows(), said) == (rows, False)


def test_values_of_any_kind_go_wherever_tables_go(path, tmp_path):
    rows = [
        {"step": 0, "a": 1, "b": 2**70, "c": "x", "d": None, "parameters": "many", "window": None, "e": True},
        {"step": 1, "a": "one", "b": 1.5, "c": 3, "d": True, "parameters": 10**300, "e": 2**100},
        {"step": 2, "loss": float("nan"), "chi_pos": float("inf"), "b": -(2**64), "": 1, "layer/": 2.0, "layer/x": 1.0},
    ]
    write(path, rows)
    history = History.read(path)
    assert [set(row) for row in history.rows()] == [set(row) for row in rows]
    assert [row["step"] for row in history.rows()] == [0, 1, 2]
    used(history)
    assert history.numbers("a")[0] == 1
    assert np.isnan(history.numbers("a")[1:]).all()
    for by_layer in (False, True):
        history.to_csv(tmp_path / "x.csv", by_layer)
        for module, call in (("pandas", History.to_pandas), ("polars", History.to_polars)):
            if _installed(module):
                call(history, by_layer)
        if _installed("pyarrow"):
            history.to_parquet(tmp_path / "x.parquet", by_layer)


def _installed(module):
    from importlib.util import find_spec

    return find_spec(module) is not None


def test_memory_and_time_are_those_of_the_file(path):
    """One new name in each line: a table of all names and all rows would have 25 million cells."""
    import tracemalloc

    path.write_bytes(b"".join(b'{"step": %d, "k%d": 1}\n' % (i, i) for i in range(5000)))
    tracemalloc.start()
    history = History.read(path)
    history.append({"step": 9000, "new": 1})
    assert (len(history), len(history.columns)) == (5001, 5002)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert np.nansum(history["k17"]) == 1


def test_one_long_line_is_read_once(path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK", 100)
    path.write_bytes(records.encode({"step": 0, "notes": "x" * 100_000, "chi_pos": 0.5}) + records.encode({"step": 1}))
    assert History.read(path)["step"].tolist() == [0, 1]
