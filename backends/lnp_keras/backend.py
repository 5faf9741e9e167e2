"""The backend's entry points: a Keras model is handed over as a function of its variables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras

import lnp
from lnp.contract.linearization import Linearization, Vector
from lnp.contract.options import Options
from lnp.contract.trees import leaves
from lnp.contract.vectors import update_by_name
from lnp_keras import replay
from lnp_keras.losses import CompiledLoss, adapted, bare, build, compiled_loss, is_ready, overridden
from lnp_keras.model import (
    Snapshot,
    Stateless,
    accepts,
    as_tensors,
    named_variables,
    observed,
    selected,
    stateless,
    unpack,
)
from lnp_keras.state_guard import foreign_variables_kept, unchanged

__all__ = ["accepts", "evaluate", "linearize"]

TERMS = (
    "terms of the loss that do not come from the outputs (regularisation, add_loss) are left out: the loss and the "
    "gradient of a training step have them"
)
OWN_STEP = "the model has a train_step of its own, which may minimise another loss than the compiled one"
OVERWRITES = (
    "a layer writes to trained variables while it runs (spectral normalisation does): on TensorFlow and PyTorch the "
    "gradient is taken at what it wrote, as in a training step, and on JAX through it"
)


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """Run the computation with the backend of the framework that Keras runs on."""
    backend = lnp.load(keras.backend.backend())
    with untouched():  # the passes that look for batch statistics draw dropout masks
        handed = _handed(model, batches, options)
    if operands.get("update") is not None:
        operands["update"] = _update(_plain(model), handed.options.parameters, operands["update"])
    result = backend.evaluate(computation, handed.model, handed.batches, handed.options, **operands)
    notes = (*handed.notes, *_notes(_plain(model), options))
    return replace(result, notes=(*result.notes, *notes)) if hasattr(result, "notes") else result


def linearize(model: Any, batch: Any, options: Options) -> Linearization:
    """The record for one batch."""
    with untouched():
        handed = _handed(model, (batch,), options)
    record = lnp.load(keras.backend.backend()).linearize(handed.model, handed.batches[0], handed.options)
    notes = (*record.notes, *handed.notes, *_notes(_plain(model), options))
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


def untouched() -> contextlib.AbstractContextManager:
    """The random states of the framework that Keras runs on are as before afterwards, where it has any."""
    return getattr(lnp.load(keras.backend.backend()), "untouched", contextlib.nullcontext)()


def _plain(model: Any) -> keras.Layer:
    return model.model if isinstance(model, Snapshot) else model


def _notes(model: Any, options: Options) -> tuple[str, ...]:
    """What a step of `fit` has that the outputs do not tell."""
    seen, notes = observed(model), []
    compiled = options.loss is None and getattr(model, "compiled", False)
    regularised = any(getattr(variable, "regularizer", None) is not None for variable in model.trainable_variables)
    if compiled and (seen.adds_terms or (regularised and not overridden(model))):
        notes.append(TERMS)
    if compiled and type(model).train_step is not keras.Model.train_step:
        notes.append(OWN_STEP)
    if seen.overwrites:
        notes.append(OVERWRITES)
    return tuple(notes)


@dataclass(frozen=True)
class _Handed:
    """What another backend gets."""

    model: tuple[Stateless, dict]
    batches: tuple
    options: Options
    notes: tuple[str, ...]


def _handed(model: Any, batches: tuple, options: Options) -> _Handed:
    before = model.values if isinstance(model, Snapshot) else None
    model = model if before is None else model.model
    function = stateless(model, options.forward)
    values = before or {name: variable.value for name, variable in named_variables(model).items()}
    parts = [unpack(batch) for batch in batches]
    loss, notes = _loss(model, options.loss, parts)
    inputs = [as_tensors(x) for x, _, _ in parts]
    frozen: list = [[] for _ in parts]
    if options.batch_statistics == "frozen" and replay.normalisations(function):
        function, frozen, more = _frozen(function, values, inputs)
        notes = (*notes, *more)
    given = tuple(
        ({"inputs": x, "statistics": statistics}, _targets(loss, x, y, weight))
        for x, statistics, (_, y, weight) in zip(inputs, frozen, parts, strict=True)
    )
    if isinstance(loss, CompiledLoss):
        _build(function, values, given[0])
    names = selected(model, options.parameters)
    return _Handed((function, values), given, replace(options, loss=loss, forward=None, parameters=names), notes)


def _build(function: Stateless, values: dict, batch: tuple) -> None:
    model: Any = function.model()
    if not (overridden(model) or is_ready(model)):
        with unchanged(model):
            build(model, bare(function(values, batch[0])), batch[1]["targets"], batch[1]["sample_weight"])


def _frozen(function: Stateless, values: dict, inputs: list) -> tuple[Stateless, list, tuple[str, ...]]:
    """The function with frozen statistics, those of each batch, and notes."""
    seen = [_seen(function, values, x) for x in inputs]
    used = [position for position in seen[0][0] if all(position in positions for positions, _ in seen)]
    statistics = [[stats for p, stats in zip(positions, found, strict=True) if p in used] for positions, found in seen]
    return replace(function, frozen=tuple(used)), statistics, (replay.NOTE,) if used else ()


def _seen(function: Stateless, values: dict, inputs: Any) -> tuple[list[int], list]:
    if keras.backend.backend() == "torch":
        import torch

        with torch.no_grad():
            return replay.seen(function, values, inputs)
    with foreign_variables_kept(function.model, function.forward):
        return replay.seen(function, values, inputs)


def _loss(model: Any, loss: Any, parts: list) -> tuple[Any, tuple[str, ...]]:
    """The loss for the other backend, and notes."""
    weighted = any(weight is not None for _, _, weight in parts)
    if loss is not None:
        loss = adapted(loss)
        if weighted and not hasattr(loss, "loss_terms"):
            raise ValueError(
                "Sample weights were given with a loss that does not take them. Expected the model's compiled loss "
                "(loss=None) or one of Keras's. Multiply by the weights in the loss itself."
            )
        return loss, ()
    if not getattr(model, "compiled", False):
        if weighted:
            raise ValueError(
                "Sample weights were given, but the model is not compiled. Expected model.compile(loss=...) before. "
                "Compile it, or pass loss=."
            )
        return None, (
            "the model is not compiled: its loss is inferred from the targets, and outputs are taken as logits",
        )
    if model.loss is None and not overridden(model):
        raise ValueError(
            "The model is compiled without a loss: what its layers add (add_loss) does not come from the outputs, "
            "which lnp measures. Expected model.compile(loss=...). Pass loss=, a function (outputs, targets) -> "
            "scalar, for the part that does."
        )
    return compiled_loss(model), ()


def _targets(loss: Any, inputs: Any, targets: Any, weight: Any) -> Any:
    targets = as_tensors(targets)
    if isinstance(loss, CompiledLoss):
        return {"inputs": inputs, "targets": targets, "sample_weight": as_tensors(weight)}
    return targets if weight is None else {"targets": targets, "sample_weight": as_tensors(weight)}
