"""A run's measurements as a table of columns: what a tracker keeps, what a file holds, what figures are drawn from.

A row is one measurement: `step`, `time` (seconds since 1970), `seconds` (what it cost), the values of
`Decomposition.to_dict()`, and what the caller added. A value may be missing in some rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lnp.printable import printable
from lnp.tracking import data_frames, storage
from lnp.tracking.columns import Column, as_columns, expected, joined, selected
from lnp.tracking.names import RESUMED, STEP
from lnp.tracking.records import encode
from lnp.user_warnings import warn

if TYPE_CHECKING:
    from lnp.runs.spectral_reach import Reach

Row = dict[str, Any]
LAYER = "layer/"


class History:
    """Rows in order of their steps, kept as NumPy columns. A million rows of 25 numbers take 200 MB.

    A run may have gone back: killed at step 1200, resumed from a checkpoint at 1000. What was measured from there on
    belongs to steps that no longer lead anywhere; the history leaves it out, so that each step occurs once. The file
    still has it.

    A column of integers of which some are missing becomes one of floats.

    Examples
    --------
    >>> history = History([{"step": 0, "loss": 2.3}, {"step": 9, "loss": 2}, {"step": 9, "loss": 1.8, "tag": "a"}])
    >>> history["loss"]
    array([2.3, 1.8])
    >>> history.rows()
    [{'step': 0, 'loss': 2.3}, {'step': 9, 'loss': 1.8, 'tag': 'a'}]
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._columns: dict[str, Column] = {}
        self._length = 0
        rows = rows if isinstance(rows, str | bytes) or not isinstance(rows, Iterable) else list(rows)
        if not (isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows)):
            raise TypeError(
                f"History received a {type(rows).__name__}. Expected rows, a list of dictionaries. A tracker has its "
                "own, tracker.history, and a file is read by lnp.History.read(path)."
            )
        self._pending: list[Row] = [dict(row) for row in rows]

    @classmethod
    def read(
        cls, path: str | os.PathLike, superseded: bool = False, report: Callable[[int], None] = lambda done: None
    ) -> History:
        """The history in a tracker's file; with `superseded`, also what a run that went back has replaced.

        `report` is called with the bytes that were read since it was last called.

        Raises
        ------
        OSError
            If there is no such file, or it is none, such as a folder or a pipe.
        ValueError
            If it holds something else than a tracker's records. Single lines that are none are left out with a warning.
        """
        history = cls()
        history._join([as_columns(records) for records in storage.read(path, report)])
        if history._length and not superseded:
            stays = _not_replaced(history._dense(STEP), history._dense(RESUMED))
            if unmarked := _replaced_without_mark(history._dense(STEP), history._dense(RESUMED)):
                warn(
                    f"{printable(path)}: the record of step {unmarked[1]} comes after one of step {unmarked[0]} and "
                    "does not say that the run went back. It replaces what was measured from there on; is it damaged?"
                )
            history._select(stays)
        return history

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a measurement.

        If its step, or the step it resumed from, is not beyond the last, it replaces what is there.
        """
        self._pending.append(dict(row))

    def go_back(self, step: int) -> None:
        """Forget the measurements at this step and later."""
        self._flush()
        if self._length:
            self._select(self._dense(STEP) < step)

    @property
    def last_step(self) -> int | None:
        """The step of the last row; None without rows."""
        if self._pending:
            return int(self._pending[-1]["step"])
        return int(self._columns[STEP].values[-1]) if self._length else None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in the order in which they first occurred."""
        self._flush()
        return tuple(self._columns)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        names = (name.removeprefix(LAYER).rpartition("/")[0] for name in self.columns if name.startswith(LAYER))
        return tuple(dict.fromkeys(names))

    def __len__(self) -> int:
        self._flush()
        return self._length

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> np.ndarray:
        """A column: numbers with nan where a row has none, or an object array with None."""
        if name not in self.columns:
            raise KeyError(f"{name!r} is not a column. {expected(self.columns, name)}")
        return self._dense(name)

    def get(self, name: str) -> np.ndarray:
        """A column, or as many nan as there are rows."""
        return self._dense(name) if name in self.columns else np.full(len(self), math.nan)

    def numbers(self, name: str) -> np.ndarray:
        """A column as floats, with nan where a row has no number; of no column, nan alone."""
        values = self.get(name)
        if values.dtype != object:
            return values.astype(np.float64)
        kinds = int | float | bool
        return np.array([float(v) if isinstance(v, kinds) else math.nan for v in values.tolist()], dtype=np.float64)

    def rows(self) -> list[Row]:
        """One dictionary for each measurement, with the values that it has."""
        self._flush()
        rows: list[Row] = [{} for _ in range(self._length)]
        for name, column in self._columns.items():
            places = range(self._length) if column.rows is None else column.rows.tolist()
            for place, value in zip(places, column.values.tolist(), strict=True):
                rows[place][name] = value
        return rows

    def by_layer(self) -> dict[str, np.ndarray]:
        """Columns of a long table: one row for each step and layer, sorted by step."""
        layers = self.layers
        names = dict.fromkeys(name.rpartition("/")[2] for name in self.columns if name.startswith(LAYER))
        table = {
            "step": np.repeat(self.get("step"), len(layers)),
            "layer": np.array([*layers] * len(self), dtype=object),
        }
        for name in names:
            parts = [self.get(f"{LAYER}{layer}/{name}") for layer in layers]
            table[name] = np.stack(parts, axis=1).ravel()
        return table

    def reach(self, *, window: int | Literal["last"] = 5, size: int = 5) -> Reach:
        """The run's spectral reach, `lnp.reach` of its population's positions where they are known, else the batch's.

        `window` and `size` count the windows of the schedule, and are all of them where there are fewer.
        """
        from lnp.runs.curves import reach  # which reads histories

        return reach(self, window=window, size=size)

    def table(self, by_layer: bool = False) -> dict[str, np.ndarray]:
        """{column: values}, of the rows or of the long table of layers."""
        return self.by_layer() if by_layer else {name: self._dense(name) for name in self.columns}

    def to_pandas(self, by_layer: bool = False) -> Any:
        """A `pandas.DataFrame`; with `by_layer`, one row for each step and layer. Needs pandas."""
        return data_frames.to_pandas(self.table(by_layer))

    def to_polars(self, by_layer: bool = False) -> Any:
        """The same as a `polars.DataFrame`. Needs Polars."""
        return data_frames.to_polars(self.table(by_layer))

    def to_csv(self, path: str | os.PathLike, by_layer: bool = False) -> None:
        """Write the table as CSV, empty where a value is missing."""
        data_frames.to_csv(self.table(by_layer), path)

    def to_parquet(self, path: str | os.PathLike, by_layer: bool = False) -> None:
        """Write the table as Parquet. Needs PyArrow."""
        data_frames.to_parquet(self.table(by_layer), path)

    def to_jsonl(self, path: str | os.PathLike) -> None:
        """Write the rows as a tracker does, without those that were replaced."""
        with open(path, "wb") as file:
            file.writelines(encode(row) for row in self.rows())

    def __repr__(self) -> str:
        steps = f", steps {int(self['step'][0])} to {self.last_step}" if len(self) else ""
        return f"History({len(self)} rows{steps}, {len(self.layers)} layers)"

    def _flush(self) -> None:
        """Put the rows that were appended since the last call into the columns."""
        if not self._pending:
            return
        rows, self._pending = self._pending, []
        self._join([(self._columns, self._length), as_columns(rows)])
        self._select(_not_replaced(self._dense(STEP), self._dense(RESUMED)))

    def _join(self, parts: list[tuple[dict[str, Column], int]]) -> None:
        """Make the parts, (columns, rows) one after the other, the content of this history."""
        self._columns, self._length = joined(parts)

    def _select(self, mask: np.ndarray) -> None:
        """Keep the rows where the mask, shape (rows,), is true."""
        if not mask.all():
            self._columns, self._length = selected(self._columns, mask)

    def _dense(self, name: str) -> np.ndarray:
        """A column with nan or None where a row has no value; of no column, nan."""
        column = self._columns.get(name)
        return np.full(self._length, math.nan) if column is None else column.dense(self._length)


def _starts(steps: np.ndarray, resumed: np.ndarray) -> np.ndarray:
    """The step from which on each row replaces earlier ones."""
    return np.fmin(steps.astype(np.float64), resumed.astype(np.float64))


def _not_replaced(steps: np.ndarray, resumed: np.ndarray) -> np.ndarray:
    """Which rows no later one replaces: their step is below every step that the run later went back to."""
    lowest_after = np.minimum.accumulate(_starts(steps, resumed)[::-1])[::-1]
    return np.append(steps[:-1] < lowest_after[1:], True)


def _replaced_without_mark(steps: np.ndarray, resumed: np.ndarray) -> tuple[int, int] | None:
    """(Step of a row, step of the next) where the second is not beyond the first and does not say that it went back."""
    places = np.flatnonzero((steps[1:] <= steps[:-1]) & np.isnan(resumed[1:].astype(np.float64)))
    return (int(steps[places[0]]), int(steps[places[0] + 1])) if len(places) else None
