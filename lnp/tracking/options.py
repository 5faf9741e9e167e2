"""The options of `lnp.decompose` that a tracker takes, and the names of its columns."""

from __future__ import annotations

import functools
import inspect
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral
from typing import Any

from lnp import api
from lnp.contract.options import Options
from lnp.losses.kinds import checked_name
from lnp.results.computations import Decompose
from lnp.tracking.names import check_names

MAY_BE_VALUES = ("seed", "parameters")
"""Options of `lnp.decompose` whose names are common as tags: a run's seed, how many parameters it has."""


def check_made(path: Any, schedule: Any, tags: Any, rank: Any, options: Mapping[str, Any]) -> None:
    """Raise an error where a tracker's arguments are of types that they cannot have, such as in another order, and for
    options and tags that it does not take.
    """
    if not isinstance(path, str | bytes | os.PathLike | None):
        raise TypeError(
            f"Tracker received a path of type {type(path).__name__}. Expected the history's file, or None. The order "
            "is lnp.Tracker(path, schedule); model and batch go to observe(step, model, batch)."
        )
    if isinstance(schedule, str | os.PathLike):
        raise TypeError(
            f"Tracker received the schedule {schedule!r}. Expected one of lnp.schedule, a number of steps or a list of "
            "them. The order is lnp.Tracker(path, schedule)."
        )
    if not isinstance(tags, Mapping | None):
        raise TypeError(f"tags is {tags!r}. Expected a dictionary of values for every row, such as {{'width': 64}}.")
    if not (rank is None or isinstance(rank, Integral) or callable(rank)):
        raise TypeError(f"rank is {rank!r}. Expected the number of the process, a function that tells it, or None.")
    if options:
        check_options(options)
    if tags:
        check_names(tags)


def check_call(options: Mapping[str, Any] | None, values: Mapping[str, Any] | None, learning_rate: Any = None) -> None:
    """Raise an error for options, names of values or tags, and learning rates that a tracker does not take."""
    if options:
        check_options(options)
    if values:
        check_names(values)
        _check_no_options(values)
        learning_rate = values.get("learning_rate", learning_rate)
    _check_learning_rate(learning_rate)


def _check_learning_rate(rate: Any) -> None:
    """Raise TypeError for what is no number by its type; an array on a device is not waited for."""
    if isinstance(rate, str | bytes | list | tuple | dict | set) or callable(rate):
        raise TypeError(
            f"learning_rate is {reprlib.repr(rate)}, a {type(rate).__name__}. Expected a number, that of this step's "
            "update. Of PyTorch's schedulers it is scheduler.get_last_lr()[0]; a function of the step goes to "
            "lnp.Tracker(learning_rate=...)."
        )


def _check_no_options(values: Iterable[str]) -> None:
    """Raise TypeError for options of `lnp.decompose` among values, where they would be columns without effect."""
    options = sorted((set(values) & set(_defaults())) - set(MAY_BE_VALUES))
    if options:
        raise TypeError(
            f"{', '.join(options)} {'are options' if len(options) > 1 else 'is an option'} of lnp.decompose, received "
            f"as a value for the row. Pass it to the tracker, or as options={{{options[0]!r}: ...}}."
        )


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
    for settings in (Options, Decompose):
        settings(**{field.name: values[field.name] for field in fields(settings) if field.name in values})
    if isinstance(values["loss"], str):
        checked_name(values["loss"])


@functools.cache
def _defaults() -> dict[str, Any]:
    """The options of `lnp.decompose` and their defaults."""
    parameters = inspect.signature(api.decompose).parameters.values()
    return {option.name: option.default for option in parameters if option.name not in ("model", "batch")}
