"""The backend's entry points: a Keras model is handed over as a function of its variables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import keras

import lnp
from lnp.contract.linearization import Array, Linearization, Vector, valid
from lnp.contract.options import Options
from lnp.contract.trees import leaves
from lnp.contract.vectors import update_by_name
from lnp.results.decomposition import sum_of
from lnp_keras.handover import Handed, handed_over, of_only_output
from lnp_keras.model import Snapshot, accepts, as_tensors, computes_narrowly, named_variables, observed
from lnp_keras.state_guard import untouched
from lnp_keras.strategies import outside_of_scope, whole

__all__ = ["accepts", "evaluate", "linearize", "untouched"]

TERMS = (
    "terms of the loss that do not come from the outputs (regularisation, add_loss) are left out: the loss and the "
    "gradient of a training step have them"
)
ADDED = "what the model's layers add to the loss"
OVERWRITES = (
    "a layer writes to trained variables while it runs (spectral normalisation does): on TensorFlow and PyTorch the "
    "gradient is taken at what it wrote, as in a training step, and on JAX through it"
)


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """Run the computation with the backend of the framework that Keras runs on."""
    with outside_of_scope():
        return _evaluated(computation, model, whole(batches, _plain(model)), options, operands)


def _evaluated(computation: Callable, model: Any, batches: tuple, options: Options, operands: dict[str, Any]) -> Any:
    """What `evaluate` returns, outside of the scope of any strategy."""
    backend = lnp.load(keras.backend.backend())
    with untouched():  # the passes that look for batch statistics draw dropout masks
        handed = handed_over(model, batches, options)
    if operands.get("update") is not None:
        operands["update"] = _update(_plain(model), handed.options.parameters, operands["update"])
    result = backend.evaluate(computation, handed.model, handed.batches, handed.options, **operands)
    if handed.alone and hasattr(result, "loss_name"):
        result = replace(result, loss_name=ADDED)
    if isinstance(result, lnp.Decomposition) and "update" not in operands and isinstance(result.loss, float):
        return _with_total(result, handed)
    notes = (*handed.notes, *_notes(handed, handed.adds_terms or handed.reads_parameters))
    return replace(result, notes=(*result.notes, *notes)) if hasattr(result, "notes") else result


def linearize(model: Any, batch: Any, options: Options) -> Linearization:
    """The record for one batch."""
    with untouched():
        handed = handed_over(model, whole((batch,), _plain(model)), options)
    record = lnp.load(keras.backend.backend()).linearize(handed.model, handed.batches[0], handed.options)
    notes = (*record.notes, *handed.notes, *_notes(handed, handed.adds_terms or handed.reads_parameters))
    return replace(record, vjp=partial(_pulled_back, record, model), notes=notes)


def _pulled_back(record: Linearization, model: Any, v: Any) -> Vector:
    """J^T v. Holds the model, to which the function that was handed over refers weakly."""
    return record.vjp(v)


def _update(model: Any, names: Any, update: Any) -> dict[str, Any]:
    """The user's update by name, as tensors."""
    variables = named_variables(model)
    shapes = {name: tuple(variables[name].shape) for name in names}
    expected = f"a dictionary {{variable's name: array}}, or one array for each of the {len(shapes)} in their order"
    return {name: as_tensors(value) for name, value in update_by_name(update, shapes, leaves, expected).items()}


def _plain(model: Any) -> keras.Layer:
    return model.model if isinstance(model, Snapshot) else model


def _notes(handed: Handed, terms: bool) -> tuple[str, ...]:
    """What the passes have shown."""
    return (*((TERMS,) if terms else ()), *((OVERWRITES,) if observed(handed.function).overwrites else ()))


def _with_total(d: lnp.Decomposition, handed: Handed) -> lnp.Decomposition:
    """With the whole loss and its rate, where it has terms that do not come from the outputs, and with notes.

    A loss that can reach what is trained need not depend on it: that shows in its rate.
    """
    total = None
    if handed.adds_terms or handed.reads_parameters:
        backend = lnp.load(keras.backend.backend())
        whole, batches = handed.whole
        options = of_only_output(handed.options)
        loss, rate = backend.evaluate(_loss_and_rate, (whole, handed.model[1]), batches[:1], options)
        rates = (rate, d.rate * getattr(d, "magnitude", 1.0) ** 2)
        if handed.adds_terms or not all(map(partial(_same, handed), (loss, rates[0]), (d.loss, rates[1]))):
            total = lnp.Total(loss, rate)
    return replace(d, total=total, notes=(*d.notes, *handed.notes, *_notes(handed, total is not None)))


def _same(handed: Handed, a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=0.05 if computes_narrowly(handed.function.model()) else 1e-4)


def _loss_and_rate(lin: Linearization) -> tuple[Array, Array]:
    """Loss and rate of a model whose only output is its loss."""
    gradient = lin.vjp(lin.loss_gradient)
    return lin.loss, valid(lin, sum_of(products := lin.inner_products(gradient, gradient), products))
