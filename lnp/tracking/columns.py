"""Columns of a table in which rows may lack values: memory for the values that are there, whatever the columns."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lnp.printable import printable
from lnp.tracking.names import holds_numbers
from lnp.tracking.records import NONFINITE


class Column(NamedTuple):
    """The values of a column, and the rows that have one, in their order; None for all rows."""

    values: np.ndarray
    rows: np.ndarray | None

    def dense(self, length: int) -> np.ndarray:
        """One value for each row: nan where a number is missing, None where something else is."""
        if self.rows is None:
            return self.values
        whole = np.full(length, None, dtype=object) if self.values.dtype == object else np.full(length, math.nan)
        whole[self.rows] = self.values
        return whole


Columns = dict[str, Column]


def as_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[Columns, int]:
    """(Columns, number of rows) of rows. Those with the same names are transposed together."""
    groups: dict[tuple, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(tuple(row), []).append(number)
    cells: dict[str, list[tuple[list[int], tuple]]] = {}
    for names, numbers in groups.items():
        for name, values in zip(names, zip(*(rows[number].values() for number in numbers), strict=True), strict=True):
            cells.setdefault(name, []).append((numbers, values))
    return {name: _column(name, parts, len(rows)) for name, parts in cells.items()}, len(rows)


def joined(parts: Sequence[tuple[Columns, int]]) -> tuple[Columns, int]:
    """The parts one after the other."""
    pieces: dict[str, list[tuple[int, int, Column]]] = {}
    total = 0
    for columns, length in parts:
        for name, column in columns.items():
            pieces.setdefault(name, []).append((total, length, column))
        total += length
    return {name: _joined_column(some, total) for name, some in pieces.items()}, total


def selected(columns: Columns, mask: np.ndarray) -> tuple[Columns, int]:
    """The rows where the mask, shape (rows,), is true, and how many these are."""
    place = np.cumsum(mask) - 1
    found = {}
    for name, (values, rows) in columns.items():
        if rows is None:
            found[name] = Column(values[mask], None)
            continue
        stays = mask[rows]
        if stays.any():
            found[name] = Column(values[stays], place[rows[stays]])
    return found, int(np.sum(mask))


def _column(name: str, parts: list[tuple[list[int], tuple]], length: int) -> Column:
    """A column from (rows, values) of several groups of rows."""
    arrays = [_measured(as_array(values)) if holds_numbers(name) else as_array(values) for _, values in parts]
    values = _concatenated(arrays)
    if len(parts) == 1 and len(values) == length:
        return Column(values, None)
    numbers = np.concatenate([np.array(numbers, dtype=np.int64) for numbers, _ in parts])
    if len(parts) > 1:
        order = np.argsort(numbers)
        numbers, values = numbers[order], values[order]
    return Column(values, None if len(numbers) == length else numbers)


def _measured(array: np.ndarray) -> np.ndarray:
    """A column that holds numbers: as floats where it is nothing but None, or has large integers."""
    if array.dtype != object or not all(isinstance(value, int | float | None) for value in array):
        return array
    return _floats(array)


def _floats(values: Iterable[float | None]) -> np.ndarray:
    """Numbers as float64: nan for None, infinite for integers beyond all floats."""
    return np.array([math.nan if value is None else _float(value) for value in values])


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _joined_column(pieces: list[tuple[int, int, Column]], total: int) -> Column:
    """One column from its pieces, each with the number of rows before it and its own."""
    values = _concatenated([column.values for _, _, column in pieces])
    if len(values) == total:
        return Column(values, None)
    rows = [start + (np.arange(length) if column.rows is None else column.rows) for start, length, column in pieces]
    return Column(values, np.concatenate(rows))


def as_array(values: Sequence[Any]) -> np.ndarray:
    """Integers as int64, numbers as float64 with nan for None, everything else as objects."""
    kinds = set(map(type, values))
    if kinds == {int}:
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:  # beyond 64 bits: Python's own integers
            return _objects(values)
    if str in kinds and kinds <= {int, float, str, type(None)}:
        values = [NONFINITE.get(v, v) if type(v) is str else v for v in values]
        kinds = set(map(type, values))
    if kinds <= {int, float, type(None)} and kinds != {type(None)}:
        try:
            return np.array(values, dtype=np.float64)  # which makes nan of None
        except OverflowError:
            return _floats(values)
    return _objects(values)


def _objects(values: Sequence[Any]) -> np.ndarray:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One array of several, whose types may differ: parts of None alone become nan among numbers."""
    if len(parts) == 1:
        return parts[0]
    if len({part.dtype for part in parts}) == 1 and parts[0].dtype != object:
        return np.concatenate(parts)
    if any(part.dtype == object and any(v is not None for v in part) for part in parts):
        return as_array([value for part in parts for value in part.tolist()])
    if all(part.dtype == object for part in parts):
        return np.concatenate(parts)
    return np.concatenate([part.astype(np.float64) for part in parts])  # which makes nan of None


def expected(columns: Sequence[str], wrong: str) -> str:
    """What to say where a column is asked for that is not there: what comes close, and those of the whole network.

    >>> expected(["step", "chi_pos", "layer/0/chi_pos"], "chi_poss")
    'Did you mean chi_pos? Expected one of step, chi_pos, or one of a layer.'
    >>> expected([], "loss")
    'Nothing has been measured yet.'
    """
    if not columns:
        return "Nothing has been measured yet."
    close = difflib.get_close_matches(wrong, columns, 3, cutoff=0.7)
    meant = f"Did you mean {' or '.join(map(printable, close))}? " if close else ""
    of_layers = any("layer/" in name for name in columns)
    known = ", ".join(printable(name) for name in columns if "layer/" not in name)
    return f"{meant}Expected one of {known}{', or one of a layer' if of_layers else ''}."
