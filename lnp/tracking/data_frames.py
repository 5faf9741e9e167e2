"""Tables of columns as data frames and files. Each needs its library only when it is used."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

Table = Mapping[str, np.ndarray]


def to_pandas(table: Table) -> Any:
    """A `pandas.DataFrame`."""
    return needed("pandas", "to_pandas()").DataFrame(dict(table))


def to_polars(table: Table) -> Any:
    """A `polars.DataFrame`; columns of mixed types become text."""
    polars = needed("polars", "to_polars()")
    return polars.DataFrame({name: _uniform(values) for name, values in table.items()})


def to_parquet(table: Table, path: str | os.PathLike) -> None:
    """A Parquet file; columns of mixed types become text."""
    arrow = needed("pyarrow", "to_parquet()")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(arrow.table({name: arrow.array(_uniform(values)) for name, values in table.items()}), path)


def to_csv(table: Table, path: str | os.PathLike) -> None:
    """A CSV file with a header line."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(values.tolist() for values in table.values()), strict=True))


def needed(module: str, what: str, extra: str | None = None) -> Any:
    """The module, or an error that names the extra: by default of the same name."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {module}, which is not installed. Run: pip install 'lnp[{extra or module}]'"
        ) from error


def _uniform(values: np.ndarray) -> Any:
    """Values of one type, None where there is none."""
    if values.dtype != object:
        return values
    listed = values.tolist()
    kinds = {type(value) for value in listed if value is not None}
    return listed if len(kinds) < 2 else [None if value is None else str(value) for value in listed]
