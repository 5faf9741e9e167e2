"""A run's measurements as a table of columns: what a tracker keeps, what a file holds, what figures are drawn from.

A row is one measurement: `step`, `time` (seconds since 1970), `seconds` (what it cost), the values of
`Decomposition.to_dict()`, and what the caller added. A value may be missing in some rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from lnp.tracking import data_frames, storage

if TYPE_CHECKING:
    from lnp.runs.spectral_reach import Reach

Row = dict[str, Any]
LAYER = "layer/"
RESUMED = "resumed"
"""The step from which on a record replaces earlier ones: a run that goes back writes it into its first record."""


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
        self._values: dict[str, np.ndarray] = {}
        self._present: dict[str, np.ndarray] = {}
        self._length = 0
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
            If there is no such file.
        ValueError
            If it holds no records with steps.
        """
        history = cls()
        history._join([_columns(records) for records in storage.read(path, report) if records])
        if history._length and "step" not in history._values:
            raise ValueError(
                f"{path} has the columns {sorted(history._values)}. Expected a tracker's file, with steps."
            )
        if not superseded:
            history._select(_not_replaced(history._values, history._present))
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
            self._select(self._values["step"] < step)

    @property
    def last_step(self) -> int | None:
        """The step of the last row; None without rows."""
        if self._pending:
            return int(self._pending[-1]["step"])
        return int(self._values["step"][-1]) if self._length else None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in the order in which they first occurred."""
        self._flush()
        return tuple(self._values)

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
            raise KeyError(f"{name!r} is not a column. Expected one of {', '.join(self.columns)}.")
        return self._values[name]

    def get(self, name: str) -> np.ndarray:
        """A column, or as many nan as there are rows."""
        return self._values[name] if name in self.columns else np.full(len(self), math.nan)

    def rows(self) -> list[Row]:
        """One dictionary for each measurement, with the values that it has."""
        self._flush()
        rows: list[Row] = [{} for _ in range(self._length)]
        for name, values in self._values.items():
            for row, value, present in zip(rows, values.tolist(), self._present[name].tolist(), strict=True):
                if present:
                    row[name] = value
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
            table[name] = np.stack(parts, axis=1).ravel() if parts else np.empty(0)
        return table

    def reach(self, *, window: int | Literal["last"] = 5, size: int = 5) -> Reach:
        """The run's spectral reach, `lnp.reach` of its population's positions where they are known, else the batch's.

        `window` and `size` count the windows of the schedule, and are all of them where there are fewer.
        """
        from lnp.runs.curves import reach  # which reads histories

        return reach(self, window=window, size=size)

    def table(self, by_layer: bool = False) -> dict[str, np.ndarray]:
        """{column: values}, of the rows or of the long table of layers."""
        return self.by_layer() if by_layer else {name: self._values[name] for name in self.columns}

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
            file.writelines(storage.encode(row) for row in self.rows())

    def __repr__(self) -> str:
        steps = f", steps {int(self['step'][0])} to {self.last_step}" if len(self) else ""
        return f"History({len(self)} rows{steps}, {len(self.layers)} layers)"

    def _flush(self) -> None:
        """Put the rows that were appended since the last call into the columns."""
        if not self._pending:
            return
        rows, self._pending = self._pending, []
        earlier = [Columns(self._values, self._present, self._length)] if self._length else []
        self._join([*earlier, _columns(rows)])
        self._select(_not_replaced(self._values, self._present))

    def _join(self, parts: Sequence[Columns]) -> None:
        """Make the parts, one after the other, the content of this history."""
        names = dict.fromkeys(name for part in parts for name in part.values)
        pieces = {name: [_padded_column(part, name) for part in parts] for name in names}
        self._length = sum(part.length for part in parts)
        self._present = {name: np.concatenate([present for _, present in column]) for name, column in pieces.items()}
        self._values = {name: _concatenate([values for values, _ in column]) for name, column in pieces.items()}

    def _select(self, mask: np.ndarray) -> None:
        """Keep the rows where the mask, shape (rows,), is true."""
        if not mask.all():
            self._values = {name: values[mask] for name, values in self._values.items()}
            self._present = {name: present[mask] for name, present in self._present.items()}
            self._length = int(mask.sum())


class Columns(NamedTuple):
    """Rows as {column: values} and {column: whether a row has one}, arrays of shape (length,)."""

    values: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    length: int


def _columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Rows, at least one, as columns."""
    first = tuple(rows[0])
    if all(tuple(row) == first for row in rows):  # several times faster than looking up each name in each row
        columns = zip(*(row.values() for row in rows), strict=True)
        values = {name: _array(column) for name, column in zip(first, columns, strict=True)}
        return Columns(values, dict.fromkeys(first, np.ones(len(rows), dtype=bool)), len(rows))
    names = dict.fromkeys(name for row in rows for name in row)
    present = {name: np.array([name in row for row in rows]) for name in names}
    return Columns({name: _array([row.get(name) for row in rows]) for name in names}, present, len(rows))


def _array(values: Sequence[Any]) -> np.ndarray:
    """Integers as int64, numbers as float64 with nan for None, everything else as objects."""
    kinds = set(map(type, values))
    if kinds == {int}:
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:  # beyond 64 bits: Python's own integers
            return np.array(values, dtype=object)
    if str in kinds and kinds <= {int, float, str, type(None)}:
        values = [storage.NONFINITE.get(v, v) if type(v) is str else v for v in values]
        kinds = set(map(type, values))
    if kinds <= {int, float, type(None)} and kinds != {type(None)}:
        return np.array(
            [math.nan if v is None else v for v in values] if type(None) in kinds else values, dtype=np.float64
        )
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _padded_column(part: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column's values and which rows have one; a column that the part lacks is all None."""
    if name in part.values:
        return part.values[name], part.present[name]
    return np.full(part.length, None, dtype=object), np.zeros(part.length, dtype=bool)


def _concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One column from its parts, whose types may differ: parts of None alone become nan among numbers."""
    if len({part.dtype for part in parts}) == 1 and parts[0].dtype != object:
        return np.concatenate(parts)
    if any(part.dtype == object and any(v is not None for v in part) for part in parts):
        return _array([value for part in parts for value in part.tolist()])
    return np.concatenate([np.full(len(p), np.nan) if p.dtype == object else p.astype(np.float64) for p in parts])


def _not_replaced(values: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which rows no later one replaces: their step is below every step that the run later went back to."""
    if "step" not in values:
        return np.ones(0, dtype=bool)
    steps = values["step"].astype(np.float64)
    starts = steps  # the step from which on a row replaces earlier ones
    if RESUMED in values:
        starts = np.fmin(steps, np.where(present[RESUMED], values[RESUMED].astype(np.float64), np.inf))
    lowest_after = np.minimum.accumulate(starts[::-1])[::-1]
    return np.append(steps[:-1] < lowest_after[1:], True)
