r"""The loss change of an update that was really taken, by any optimizer: predicted to first order, and measured.

    predicted = <grad L(theta), Delta>,   measured = L(theta + Delta) - L(theta),   Delta = after - before

Both are of the same function: the same batch, dropout masks and batch statistics, those of the step itself where the
backend can repeat them. Momentum, weight decay, clipping and schedules are part of Delta, whatever they did.

Source: docs/theory.md, "A step that was really taken".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lnp.api import decompose
from lnp.arguments import Batch, Forward, Loss, Model
from lnp.contract import registry
from lnp.contract.options import BatchStatistics, Options
from lnp.parameter_texts import parameters_of
from lnp.results.computations import changes


@dataclass(frozen=True)
class StepTaken:
    """The loss change of an update: `predicted` to first order, and `measured` by evaluating the loss after it."""

    predicted: float
    measured: float


def snapshot(model: Model) -> Any:
    """The model as it is now, for `step_taken`: a copy of its parameters, or the model itself where nothing changes it.

    Raises
    ------
    TypeError
        For a model whose backend cannot take one.
    """
    return _verb(model, "snapshot")(model)


@parameters_of(decompose)
def step_taken(
    before: Any,
    after: Model,
    batch: Batch,
    loss: Loss = None,
    *,
    forward: Forward = None,
    loss_terms: int | None = None,
    batch_statistics: BatchStatistics = "frozen",
) -> StepTaken:
    """The loss change, on a batch, of the step from one model to the other. Nothing is changed.

    Parameters
    ----------
    before:
        `snapshot(model)` from before the update; in JAX the model of before, which is still there.
    after:
        The model after the update.
    batch, loss, forward, loss_terms, batch_statistics:
        As for `lnp.decompose`.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> before = lnp_numpy.LinearModel(weight=numpy.zeros((1, 1)))
    >>> after = lnp_numpy.LinearModel(weight=numpy.full((1, 1), 0.1))
    >>> step = lnp.step_taken(before, after, (numpy.ones((1, 1)), numpy.ones((1, 1))))
    >>> round(step.predicted, 6), round(step.measured, 6)
    (-0.2, -0.19)
    """
    update = _verb(before, "difference")(before, after)
    options = Options(
        loss=loss,
        forward=forward,
        loss_terms=loss_terms,
        batch_statistics=batch_statistics,
        split=False,
        population=False,
    )
    backend = registry.find(before)
    with getattr(backend, "replayed", contextlib.nullcontext)(before):
        predicted, measured = backend.evaluate(changes, before, (batch,), options, update=update)
    return StepTaken(predicted, measured)


def _verb(model: Model, name: str) -> Callable:
    """The function of this name, snapshot or difference, of the model's backend; a TypeError where it has none."""
    backend = registry.find(model)
    verb = getattr(backend, name, None)
    if verb is None:
        raise TypeError(
            f"lnp cannot compare a model of type {type(model).__name__} before and after an update: its backend has no "
            "snapshot and difference. Expected a model of PyTorch, JAX, TensorFlow, Keras or lnp_numpy. With the "
            "update at hand, lnp.predicted_loss_change and lnp.measured_loss_change take it for any model."
        )
    return verb
