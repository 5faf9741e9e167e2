"""Histories in pandas, Polars and Parquet, and values in loggers. Here because this session has the libraries."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

import lnp.loggers
from lnp.tracking import records
from lnp.tracking.history import History

ROWS = [
    {"step": 0, "loss": 2.0, "layer/a/rate": 1.0, "layer/b/rate": 3.0, "estimator": "exact"},
    {"step": 5, "loss": math.nan, "layer/a/rate": 2.0, "layer/b/rate": 4.0, "estimator": None},
    {"step": 9, "loss": math.inf, "layer/a/rate": -math.inf, "accuracy": 0.5, "estimator": 3},
]
HISTORY = History(ROWS)


def test_pandas():
    frame = HISTORY.to_pandas()
    assert frame["step"].tolist() == [0, 5, 9]
    assert frame["step"].dtype == np.int64
    assert frame["loss"].iloc[2] == math.inf
    assert frame["loss"].isna().tolist() == [False, True, False]
    long = HISTORY.to_pandas(by_layer=True)
    assert long["layer"].tolist() == ["a", "b"] * 3
    assert long["rate"].tolist()[:4] == [1.0, 3.0, 2.0, 4.0]


def test_polars():
    frame = HISTORY.to_polars()
    assert frame["step"].to_list() == [0, 5, 9]
    assert frame["loss"].to_list()[2] == math.inf
    assert frame["estimator"].to_list() == ["exact", None, "3"]
    assert HISTORY.to_polars(by_layer=True)["rate"].to_list()[:4] == [1.0, 3.0, 2.0, 4.0]


def test_parquet(tmp_path):
    import pyarrow.parquet

    HISTORY.to_parquet(tmp_path / "run.parquet")
    columns = pyarrow.parquet.read_table(tmp_path / "run.parquet").to_pydict()
    assert columns["step"] == [0, 5, 9]
    assert columns["loss"][2] == math.inf
    assert columns["estimator"] == ["exact", None, "3"]


def test_orjson_reads_what_pythons_parser_reads(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 10, "big": 123456789012345678901234567890}\n{"step": 11, "loss": NaN}\n{"step": 12')
    assert records.parser().__module__ == "orjson"
    fast = History.read(path)
    monkeypatch.setitem(sys.modules, "orjson", None)
    assert records.parser() is json.loads
    assert repr(fast.rows()) == repr(History.read(path).rows())
    assert fast["step"].tolist() == [10, 11]


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    for logger in (lnp.loggers.tensorboard(writer), lnp.loggers.as_logger(writer)):
        logger({"lnp/chi_pos": 0.5, "lnp/chi_net": math.nan}, 7)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("lnp/chi_pos")] == [(7, 0.5), (7, 0.5)]
    assert math.isnan(events.Scalars("lnp/chi_net")[0].value)
    with pytest.raises(TypeError, match="SummaryWriter"):
        lnp.loggers.tensorboard("folder")
