"""The options of `lnp.decompose` that a tracker takes, and the names of its columns."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from lnp import api
from lnp.contract.options import Options
from lnp.estimators.trace import Settings
from lnp.tracking.names import check_names


def check_call(options: Mapping[str, Any] | None, values: Iterable[str] | None) -> None:
    """Raise an error for options, and names of values or tags, that a tracker does not take."""
    if options:
        check_options(options)
    if values:
        check_names(values)


def check_options(options: Mapping[str, Any]) -> None:
    """A TypeError for options that `lnp.decompose` does not have, a ValueError for values that they cannot take."""
    defaults = _defaults()
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise TypeError(
            f"Tracker received the options {', '.join(unknown)}. Expected path, schedule, batch, tags, loggers, rank, "
            f"fsync, on_error, or an option of lnp.decompose: {', '.join(defaults)}."
        )
    values = {**defaults, **options}
    for settings in (Options, Settings):
        settings(**{field.name: values[field.name] for field in fields(settings) if field.name in values})


@functools.cache
def _defaults() -> dict[str, Any]:
    """The options of `lnp.decompose` and their defaults."""
    parameters = inspect.signature(api.decompose).parameters.values()
    return {option.name: option.default for option in parameters if option.name not in ("model", "batch")}
