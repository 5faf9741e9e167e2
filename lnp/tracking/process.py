"""This process among those that train together, and models that one process alone cannot measure."""

from __future__ import annotations

import contextlib
import os

from lnp.arguments import Model
from lnp.contract import registry


def process_rank() -> int:
    """The number of this process among those that train together, from the environment or a framework that knows it.

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
    return registry.process_number() or 0


def has_others() -> bool:
    """Whether a framework knows of other processes, with which it computes as one."""
    return registry.process_number() is not None


def needs_all(model: Model) -> bool:
    """Whether other processes hold parts of the model, so that all of them have to measure it."""
    verb = getattr(registry.find(model), "needs_all", None)
    return bool(verb and verb(model))


def single_process(model: Model) -> contextlib.AbstractContextManager:
    """Around a measurement that the other processes of a run do not make: what would wait for them raises an error."""
    return getattr(registry.find(model), "alone", contextlib.nullcontext)()


def refuse(model: Model, reason: str | None = None) -> None:
    """Refuse a model of which its backend, or the caller, knows that it cannot be measured; the model is not changed.

    Raises
    ------
    ValueError
        With the backend's reason, or the caller's.
    TypeError
        For a model that no backend accepts.
    """
    if reason is None:
        backend = registry.find(model)
        reason = backend.refusal(model) if hasattr(backend, "refusal") else None
    if reason is not None:
        raise ValueError(reason)
