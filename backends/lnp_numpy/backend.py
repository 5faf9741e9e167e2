"""From a NumPy model and a batch to the record that the core works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from array_api_compat import numpy as xp

from lnp.contract.linearization import Linearization
from lnp.contract.options import Options
from lnp.contract.trees import map_leaves
from lnp.contract.validation import check_lengths, check_outputs, select, unpack
from lnp.estimators.signs import Signs, layout, seed_words
from lnp.losses import kinds
from lnp.losses.evidence import described, evidence
from lnp_numpy.losses import value_and_gradient
from lnp_numpy.model import JacobianModel, LinearModel, OperatorModel


def accepts(model: Any) -> bool:
    """Whether this is one of this package's models."""
    return isinstance(model, JacobianModel | LinearModel | OperatorModel)


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """Run the computation on the linearised batches; NumPy arrays of shape () become floats."""
    if "update" in operands:
        operands["update"] = _checked_update(model, operands["update"])
    records = [linearize(model, batch, options) for batch in batches]
    for record in records:
        for violated, message in record.violations:
            if violated:
                raise ValueError(message)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return map_leaves(_to_float, computation(*records, **operands))


def linearize(model: Any, batch: Any, options: Options) -> Linearization:
    """The record for one batch."""
    inputs, targets = unpack(batch)
    with np.errstate(invalid="ignore", over="ignore"):
        local = model.linearize(inputs)
    samples = check_outputs([local.outputs.shape])
    shape, flat = local.outputs.shape, (samples, -1)
    numbers = samples, local.outputs[0].size
    targets = np.asarray(targets)
    integer = np.issubdtype(targets.dtype, np.integer)
    loss = kinds.resolve(options.loss, shape, targets.shape, integer)
    check_lengths(samples, targets.shape)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        value, gradient = value_and_gradient(loss, local.outputs, targets)
    terms, violations, notes = _terms(loss, shape, targets, integer, options.loss_terms)
    takes = loss if isinstance(loss, str) else ""
    name, inputs = described(options.loss, takes, None, (local.outputs, targets), True, integer)
    chosen = select(model.parameters, options.parameters)
    keep = _restrict(chosen)

    def sample_square_norms(v: np.ndarray) -> Mapping[str, np.ndarray]:
        return keep(local.sample_square_norms(v.reshape(shape)))

    return Linearization(
        xp=xp,
        outputs=local.outputs.reshape(flat),
        loss=value,
        loss_gradient=gradient.reshape(flat),
        loss_terms=terms,
        vjp=lambda v: keep(local.vjp(v.reshape(shape))),
        inner_products=lambda u, w: {name: np.sum(_wide(u[name]) * _wide(w[name])) for name in chosen},
        signs=Signs(xp, seed_words(options.seed), numbers, *layout([shape]), local.outputs.dtype),
        jvp=lambda u: local.jvp(_padded(model, u)).reshape(flat),
        sample_square_norms=sample_square_norms if options.split and local.sample_square_norms else None,
        sample_cost=1.0,
        loss_along=lambda u, step: value_and_gradient(loss, local.moved(u, step), targets)[0],
        separable=isinstance(loss, str),
        sample_losses=lambda: _alone(loss, local.outputs, targets),
        sample_terms=kinds.sample_label_terms(xp, targets) if loss == "cross_entropy" and integer else None,
        violations=violations,
        notes=notes,
        loss_name=name,
        evidence=evidence(xp, inputs, gradient),
    )


def _alone(loss: Any, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(N,) the loss of each sample by itself."""
    rows = [slice(n, n + 1) for n in range(len(outputs))]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return np.stack([np.asarray(value_and_gradient(loss, outputs[n], targets[n])[0]) for n in rows])


def _terms(loss: Any, shape: tuple, targets: np.ndarray, integer: bool, given: int | None) -> tuple[Any, tuple, tuple]:
    """(loss_terms, violations, notes)."""
    violations: tuple = ()
    if loss == "cross_entropy" and integer:
        violations = (kinds.labels_out_of_range(xp, targets, shape[-1]),)
        terms = kinds.label_terms(xp, targets)
    elif loss == "cross_entropy":
        terms = math.prod(shape[:-1])
    elif loss == "mse":
        terms = math.prod(shape)
    elif given is None:
        terms, note = kinds.assumed_terms(xp, shape, targets, integer)
        return terms, (), (note,)
    return (terms if given is None else given), violations, ()


def _restrict(chosen: list[str]) -> Callable[[Mapping], dict]:
    return lambda vector: {name: vector[name] for name in chosen}


def _padded(model: Any, u: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A vector on every parameter, zero on those that were not selected."""
    return {name: u.get(name, np.zeros_like(p)) for name, p in model.parameters.items()}


def _checked_update(model: Any, update: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The user's update, if it has an array of the right shape for every parameter."""
    for name, parameter in model.parameters.items():
        if not isinstance(update, Mapping) or name not in update or np.shape(update[name]) != np.shape(parameter):
            raise ValueError(
                f"The update, or the preconditioner, of type {type(update).__name__} does not match the model's "
                f"parameters. Expected a dictionary with an array of shape {np.shape(parameter)} for {name!r}."
            )
    return update


def _wide(array: np.ndarray) -> np.ndarray:
    """In float32 or better."""
    return np.asarray(array, dtype=np.result_type(array, np.float32))


def _to_float(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray | np.generic) and np.ndim(value) == 0 else value
