"""A history keeps what was measured, leaves out what was replaced, and goes wherever tables go."""

from __future__ import annotations

import csv
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lnp
import lnp_numpy
from lnp.tracking import data_frames
from lnp.tracking.history import History
from lnp.tracking.records import encode
from lnp.tracking.storage import Appender

ROWS = [
    {"step": 0, "loss": 2.0, "layer/a/chi_net": 1.0, "layer/b.c/chi_net": 3.0, "estimator": "exact"},
    {"step": 5, "loss": math.nan, "layer/a/chi_net": 2.0, "layer/b.c/chi_net": 4.0, "estimator": "joint"},
    {"step": 9, "loss": math.inf, "layer/a/chi_net": -math.inf, "accuracy": 0.5},
]


def standing(records):
    """What counts, said in another way: each record removes earlier ones from its step on, or from where it resumed."""
    kept = []
    for record in records:
        back = min(record["step"], record.get("resumed", math.inf))
        kept = [*(k for k in kept if k["step"] < back), record]
    return [k["step"] for k in kept]


@given(st.lists(st.tuples(st.integers(0, 20), st.none() | st.integers(0, 20)), max_size=30), st.integers(1, 30))
def test_each_step_counts_once(pairs, together):
    records = [{"step": s} | ({} if r is None else {"resumed": r}) for s, r in pairs]
    history = History()
    for index, record in enumerate(records):
        history.append(record)
        if index % together == 0:
            assert len(history) > 0  # puts the rows into columns, which must not change what counts
    steps = [row["step"] for row in history.rows()]
    assert steps == standing(records) == [row["step"] for row in History(records).rows()]
    assert steps == sorted(set(steps))


def test_going_back_to_a_step_forgets_it():
    history = History(ROWS)
    history.go_back(5)
    assert history["step"].tolist() == [0]


def test_the_file_keeps_what_was_replaced(tmp_path):
    path = tmp_path / "run.jsonl"
    file = Appender(path)
    for record in ({"step": 0}, {"step": 8}, {"step": 10}, {"step": 12, "resumed": 9}):
        file.append(record)
    file.close()
    assert History.read(path)["step"].tolist() == [0, 8, 12]
    assert History.read(path, superseded=True)["step"].tolist() == [0, 8, 10, 12]


def test_columns_have_types_and_nan_where_nothing_was_given():
    history = History(ROWS)
    assert history["step"].dtype == np.int64
    assert history["loss"].tolist()[::2] == [2.0, math.inf]
    assert np.isnan(history["loss"][1])
    assert np.isnan(history["accuracy"][:2]).all()
    assert history["estimator"].tolist() == ["exact", "joint", None]
    assert np.isnan(history.get("nothing")).all()
    with pytest.raises(KeyError, match="Expected one of step, loss"):
        history["nothing"]


def test_a_column_of_integers_floats_and_none_is_one_of_floats():
    history = History([{"step": 0, "a": 1}, {"step": 1, "a": 2.5}, {"step": 2, "a": None}])
    assert history["a"].dtype == np.float64
    assert history["a"].tolist() == pytest.approx([1, 2.5, math.nan], nan_ok=True)


def test_integers_beyond_64_bits_of_which_some_are_missing_become_floats():
    rows = [{"step": 0, "a": 2**70}, {"step": 1, "b": 0, "a": None}]
    for history in (History(rows), History([*rows[:1], {"step": 1, "a": None}])):
        assert history["a"].dtype == np.float64
        assert history["a"].tolist() == pytest.approx([2.0**70, math.nan], nan_ok=True)


def test_what_stands_where_numbers_are_expected():
    """Words stay what they are; integers beyond all floats are infinite."""
    history = History([{"step": 0, "loss": "lost"}])
    assert history["loss"].tolist() == ["lost"]
    mixed = History([{"step": 0, "loss": "lost"}, {"step": 1, "loss": 0.5}])
    assert mixed["loss"].tolist() == ["lost", 0.5]
    huge = History([{"step": 0, "loss": 10**400}, {"step": 1, "loss": -(10**400)}, {"step": 2, "loss": None}])
    np.testing.assert_array_equal(huge["loss"], [np.inf, -np.inf, np.nan])


def test_values_of_rows_with_other_columns_stay_beside_each_other():
    rows = [{"step": 0, "a": 1.5, "b": 1.5}, {"step": 1, "a": "x", "b": None, "c": True}]
    history = History(rows)
    assert history["a"].tolist() == [1.5, "x"]
    assert history["b"].dtype == np.float64
    assert history["b"].tolist() == pytest.approx([1.5, math.nan], nan_ok=True)


def test_records_that_went_back_in_silence_are_named(tmp_path):
    for steps, kept, told in (
        ([0, 5, 9, 7, 12], [0, 5, 7, 12], "the record of step 7 comes after one of step 9"),
        ([0, 1, 1, 3], [0, 1, 3], "the record of step 1 comes after one of step 1"),
    ):
        (tmp_path / "run.jsonl").write_bytes(b"".join(encode({"step": step}) for step in steps))
        with pytest.warns(UserWarning, match=told):
            assert History.read(tmp_path / "run.jsonl")["step"].tolist() == kept


def test_rows_have_only_what_was_given():
    back = History(ROWS).rows()
    assert [list(row) for row in back] == [list(row) for row in ROWS]
    assert repr(back) == repr(ROWS)


def test_rows_come_back_from_a_file(tmp_path):
    History(ROWS).to_jsonl(tmp_path / "run.jsonl")
    assert repr(History.read(tmp_path / "run.jsonl").rows()) == repr(ROWS)


def test_layers_as_a_long_table():
    history = History(ROWS)
    assert history.layers == ("a", "b.c")
    table = history.by_layer()
    assert table["step"].tolist() == [0, 0, 5, 5, 9, 9]
    assert table["layer"].tolist() == ["a", "b.c"] * 3
    assert table["chi_net"].tolist()[:5] == [1.0, 3.0, 2.0, 4.0, -math.inf]
    assert math.isnan(table["chi_net"][5])


def test_csv(tmp_path):
    History(ROWS).to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "5", "9"]
    assert [float(row["loss"]) for row in rows][::2] == [2.0, math.inf]
    assert rows[2]["estimator"] == ""
    History(ROWS).to_csv(tmp_path / "layers.csv", by_layer=True)
    assert (tmp_path / "layers.csv").read_text().splitlines()[1] == "0,a,1.0"


@pytest.mark.parametrize("name", ["to_pandas", "to_polars", "to_csv", "to_parquet"])
def test_a_table_is_of_rows_where_layers_are_not_asked_for(name, monkeypatch):
    tracker, path = lnp.Tracker(), ["run"] * (name in ("to_csv", "to_parquet"))
    tracker.load_state_dict({**tracker.state_dict(), "rows": ROWS})
    monkeypatch.setattr(data_frames, name, lambda table, *others: seen.append("layer" in table))
    for holder in (History(ROWS), tracker):
        if (write := getattr(holder, name, None)) is not None:
            seen = []
            write(*path), write(*path, by_layer=True)
            assert seen == [False, True]


def test_an_empty_history(tmp_path):
    history = History()
    assert (len(history), history.columns, history.rows(), history.layers, history.last_step) == (0, (), [], (), None)
    history.to_csv(tmp_path / "run.csv")
    (tmp_path / "run.jsonl").touch()
    assert len(History.read(tmp_path / "run.jsonl")) == 0


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"name": "x"}\n')
    with pytest.raises(ValueError, match="Expected a tracker's file"):
        History.read(tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("pandas", lambda h, path: h.to_pandas()),
        ("polars", lambda h, path: h.to_polars()),
        ("pyarrow", lambda h, path: h.to_parquet(path)),
    ],
)
def test_a_missing_library_is_named_with_its_extra(module, call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'lnp\[{module}\]'"):
        call(History(ROWS), tmp_path / "x")


def test_typed_tables_get_texts_where_a_column_has_several_types_or_integers_beyond_64_bits(monkeypatch):
    rows = [
        {"step": 0, "one": "x", "flag": True, "mixed": 1, "large": 2**70},
        {"step": 1, "one": None, "flag": None, "mixed": "x", "large": 3},
        {"step": 2, "one": "y", "flag": False, "mixed": None, "large": -(2**64)},
    ]
    polars = types.ModuleType("polars")
    polars.DataFrame = lambda columns: {name: list(values) for name, values in columns.items()}
    monkeypatch.setitem(sys.modules, "polars", polars)
    assert History(rows).to_polars() == {
        "step": [0, 1, 2],
        "one": ["x", None, "y"],
        "flag": [True, None, False],
        "mixed": ["1", "x", None],
        "large": [str(2**70), "3", str(-(2**64))],
    }


def test_a_run_recorded_by_an_earlier_version_opens(tmp_path):
    """Written by lnp 0.1.0 before its files moved: tags, layers, population values, and a restart at step 4."""
    path = tmp_path / "run.jsonl"
    path.write_bytes((Path(__file__).parent / "recorded_by_0_1_0.jsonl").read_bytes())
    history = History.read(path)
    assert history["step"].tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert history["loss"][0] == pytest.approx(1.1898245625)
    assert history["rate"] == pytest.approx(history["chi_loss"] * history["chi_net"] * history["chi_pos"], rel=1e-12)
    assert np.isfinite(history["population/chi_pos"]).all()
    assert history["layer/weight/chi_net"][0] == pytest.approx(2.33504025)
    assert np.isnan(history["accuracy"][4:]).all()
    assert 0 < lnp.reach(history["step"], history["chi_pos"]).chi_pos < history["chi_pos"].max()
    with lnp.Tracker(path, schedule=lambda step: True) as tracker:
        tracker.observe(8, lnp_numpy.LinearModel(weight=np.zeros((1, 1))), (np.ones((2, 1)), np.ones((2, 1))))
    assert len(History.read(path)) == 8


def test_a_table_is_of_the_rows_unless_layers_are_asked_for():
    history = History([{"step": s, "loss": 1.0, "layer/a/chi_net": 2.0, "layer/b/chi_net": 3.0} for s in range(2)])
    assert list(history.table()) == ["step", "loss", "layer/a/chi_net", "layer/b/chi_net"]
    assert history.table(by_layer=True)["chi_net"].tolist() == [2.0, 3.0, 2.0, 3.0]
