"""What a tracker needs around a measurement: its options, its row, the number of its process."""

from __future__ import annotations

import functools
import inspect
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from lnp import api
from lnp.contract.options import Options
from lnp.estimators.trace import Settings
from lnp.results.cross_response import CrossResponse
from lnp.results.decomposition import Decomposition
from lnp.tracking.history import RESUMED


class Watched:
    """A step that is being taken.

    Attributes
    ----------
    decomposition:
        Of before the update; None where nothing is measured.
    model:
        The model after the update.
    """

    def __init__(self, decomposition: Decomposition | None, model: Any) -> None:
        self.decomposition, self.model = decomposition, model

    def after(self, model: Any) -> None:
        """Say what the update has made of the model, where it is a new one."""
        self.model = model


def process_rank() -> int:
    """The number of this process among those that train together, from the environment.

    Raises
    ------
    ValueError
        If the variable holds no integer.
    """
    for name in ("RANK", "LOCAL_RANK"):
        if value := os.environ.get(name):
            try:
                return int(value)
            except ValueError as error:
                raise ValueError(
                    f"The environment variable {name} is {value!r}. Expected the number of the process. Pass rank= to "
                    "the tracker if it means something else."
                ) from error
    return 0


def measured(
    step: int, model: Any, batch: Any, own: Any, options: Mapping[str, Any]
) -> tuple[Decomposition, dict[str, Any]]:
    """The decomposition and its values: of the batch that is trained on, with the response of the tracker's own to it.

    Raises
    ------
    ValueError
        Without any batch.
    """
    if batch is None and own is None:
        raise ValueError(
            f"observe({step}, ...) received no batch, and the tracker has none. Expected one of the two: pass the "
            "batch that the step trains on, or make the tracker with batch=."
        )
    if batch is None or own is None:
        d = api.decompose(model, own if batch is None else batch, **options)
        return d, d.to_dict()
    cross = api.cross_response(model, batch, own, **{"population": None, **options})
    return cross.trained, cross.trained.to_dict() | cross_values(cross)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of shape (), as compiled functions return them, as Python's numbers."""
    numbers = int | float | str | None
    return {
        name: value if isinstance(value, numbers) else value.item() if hasattr(value, "item") else float(value)
        for name, value in values.items()
    }


def numbers(row: Mapping[str, Any], tags: Iterable[str]) -> dict[str, float]:
    """What loggers get of a row: {"lnp/chi_pos": 0.01, ...}."""
    left_out = (RESUMED, "time", *tags)
    return {
        f"lnp/{name}": float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and name not in left_out
    }


def cross_values(cross: CrossResponse) -> dict[str, Any]:
    """The cross response under "cross/...", and the decomposition of its measured batch under "measured/..."."""
    names = ("rate", "chi_loss", "chi_net", "chi_pos", "chi_net_stderr", "chi_pos_stderr")
    flat = {f"cross/{name}": getattr(cross, name) for name in names}
    return flat | {f"measured/{name}": value for name, value in cross.measured.to_dict().items()}


def moved(seed: Any, step: int) -> Any:
    """Another seed at each step, so that errors average out over a window; keys of other kinds stay as they are.

    >>> moved(3, 10), moved("key", 10)
    (13, 'key')
    """
    try:
        return operator.index(seed) + step
    except TypeError:
        return seed


def check_options(options: Mapping[str, Any]) -> None:
    """A TypeError for options that `lnp.decompose` does not have, a ValueError for values that they cannot take."""
    defaults = _defaults()
    wrong = sorted(set(options) - set(defaults))
    if wrong:
        raise TypeError(
            f"Tracker received the options {', '.join(wrong)}. Expected path, schedule, batch, tags, loggers, rank, "
            f"fsync, on_error, or an option of lnp.decompose: {', '.join(defaults)}."
        )
    values = {**defaults, **options}
    for settings in (Options, Settings):
        settings(**{field.name: values[field.name] for field in fields(settings) if field.name in values})


@functools.cache
def _defaults() -> dict[str, Any]:
    """The options of `lnp.decompose` and their defaults."""
    known = inspect.signature(api.decompose).parameters.values()
    return {option.name: option.default for option in known if option.name not in ("model", "batch")}
