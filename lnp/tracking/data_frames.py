"""Tables of columns as data frames and files. Each needs its library only when it is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lnp.optional import import_optional

Table = Mapping[str, np.ndarray]


def to_pandas(table: Table) -> Any:
    """A `pandas.DataFrame`."""
    return import_optional("pandas", "to_pandas()").DataFrame(dict(table))


def to_polars(table: Table) -> Any:
    """A `polars.DataFrame`; columns of mixed types become text."""
    polars = import_optional("polars", "to_polars()")
    return polars.DataFrame({name: _with_one_type(values) for name, values in table.items()})


def to_parquet(table: Table, path: str | os.PathLike) -> None:
    """Write a Parquet file; columns of mixed types become text."""
    arrow = import_optional("pyarrow", "to_parquet()")
    parquet = import_optional("pyarrow.parquet", "to_parquet()", install="'lnp[pyarrow]'")
    parquet.write_table(arrow.table({name: arrow.array(_with_one_type(x)) for name, x in table.items()}), path)


def to_csv(table: Table, path: str | os.PathLike) -> None:
    """Write a CSV file with a header line."""
    import csv  # not needed to track a run

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(values.tolist() for values in table.values()), strict=True))


def _with_one_type(values: np.ndarray) -> np.ndarray | list[Any]:
    """A column as typed libraries take it: values of several types and integers beyond 64 bits as texts, None where one
    is missing.
    """
    if values.dtype != object:
        return values
    listed = values.tolist()
    types = {type(value) for value in listed if value is not None}
    return listed if len(types) < 2 and types != {int} else [None if value is None else str(value) for value in listed]
