"""A backend of lnp for autograd (`pip install autograd`), in one file.

A model is `Model(apply, parameters)`, where `apply(parameters, inputs) -> outputs` is written in `autograd.numpy`. The
distribution beside this file names it under the entry-point group `lnp.backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
from array_api_compat import numpy as xp
from autograd.core import make_vjp
from autograd.scipy.special import logsumexp

from lnp.contract.linearization import Linearization, coupling_tolerance
from lnp.contract.options import Options
from lnp.contract.trees import map_leaves
from lnp.contract.validation import check_lengths, check_loss, check_outputs, select, unpack
from lnp.estimators.signs import Signs, layout, seed_words
from lnp.losses import kinds
from lnp.losses.evidence import evidence

Vector = Mapping[str, np.ndarray]


@dataclass
class Model:
    """A function of its parameters, {name: array}, and inputs."""

    apply: Callable[[Vector, Any], Any]
    parameters: dict[str, np.ndarray]


def accepts(model: Any) -> bool:
    """Whether it is one of this backend's models; nothing that belongs to another one."""
    return isinstance(model, Model)


def evaluate(computation: Callable, model: Model, batches: tuple, options: Options, **operands: Any) -> Any:
    """What the computation makes of the linearised batches, with floats in the place of arrays of shape ()."""
    records = [linearize(model, batch, options) for batch in batches]
    for wrong, message in (check for record in records for check in record.violations):
        if wrong:
            raise ValueError(message)
    if "update" in operands:
        operands["update"] = checked_update(model, operands["update"])
    with np.errstate(all="ignore"):  # what is 0/0 comes out as nan
        return map_leaves(as_float, computation(*records, **operands))


def linearize(model: Model, batch: Any, options: Options) -> Linearization:
    """The record of one batch: the network and its loss around the current parameters."""
    inputs, targets = unpack(batch)
    targets = np.asarray(targets)
    parameters = {name: model.parameters[name] for name in select(model.parameters, options.parameters)}

    def outputs_of(moving: Vector, inputs: Any = inputs) -> Any:
        return model.apply({**model.parameters, **moving}, inputs)

    with np.errstate(all="ignore"):
        pull, outputs = make_vjp(outputs_of, parameters)
        samples = check_outputs([outputs.shape])
        check_lengths(samples, targets.shape)
        loss = bind(options, outputs, targets)
        check_loss(np.shape(loss.function(outputs, targets)))
        value, gradient = autograd.value_and_grad(lambda f: loss.function(f, targets))(outputs)
        gradient = gradient.astype(outputs.dtype)  # whose constants autograd has in float64
        singles = [make_vjp(lambda p, n=n: outputs_of(p, inputs[n : n + 1]), parameters) for n in range(samples)]
        together, alone = pull(gradient), [one(gradient[n : n + 1]) for n, (one, _) in enumerate(singles)]
    sizes = samples, outputs[0].size
    # samples that interact have other outputs by themselves, or gradients that do not add up to the batch's
    apart = same(np.concatenate([own for _, own in singles]), outputs) and all(
        same(sum(one[name] for one in alone), together[name]) for name in parameters
    )

    def sample_square_norms(v: np.ndarray) -> dict[str, np.ndarray]:
        """||J_n^T v_n||^2, each sample run by itself: right for networks whose samples do not interact."""
        pulled = [one(v[n].reshape(1, *outputs.shape[1:])) for n, (one, _) in enumerate(singles)]
        return {name: np.array([np.sum(one[name] ** 2) for one in pulled]) for name in parameters}

    def jvp(u: Vector) -> np.ndarray:
        """J u as the gradient of <J^T v, u> with respect to v: autograd has a reverse mode of its reverse mode."""
        along = autograd.grad(lambda v: sum(anp.sum(pull(v)[name] * u[name]) for name in parameters))
        return along(np.zeros_like(outputs)).reshape(sizes)

    def loss_along(u: Vector, step: Any) -> Any:
        return loss.function(outputs_of({name: parameters[name] + step * u[name] for name in parameters}), targets)

    return Linearization(
        xp=xp,
        outputs=outputs.reshape(sizes),
        loss=np.asarray(value),
        loss_gradient=gradient.reshape(sizes),
        loss_terms=loss.terms,
        vjp=lambda v: pull(v.reshape(outputs.shape)),
        inner_products=lambda u, w: {name: np.sum(u[name] * w[name]) for name in parameters},
        signs=Signs(xp, seed_words(options.seed), sizes, *layout([outputs.shape]), outputs.dtype),
        jvp=jvp,
        sample_square_norms=sample_square_norms if options.split and apart else None,
        sample_cost=float(samples),
        loss_along=loss_along,
        separable=loss.separable,
        sample_terms=loss.sample_terms,
        violations=loss.violations,
        notes=loss.notes,
        loss_name=loss.name,
        evidence=evidence(xp, loss.inputs, gradient) if loss.inputs is not None else {},
    )


def same(alone: np.ndarray, together: np.ndarray) -> bool:
    """Whether the numbers of samples by themselves are those of the batch, up to rounding."""
    scale = coupling_tolerance(xp, together.dtype) * np.max(np.abs(together), initial=0.0)
    return bool(np.all((np.abs(alone - together) <= scale) | (np.isnan(alone) & np.isnan(together))))


def bind(options: Options, outputs: np.ndarray, targets: np.ndarray) -> kinds.Prepared:
    """The loss that is meant, and how many terms it averages: the core decides, in this framework's functions."""
    integer = np.issubdtype(targets.dtype, np.integer)
    given = kinds.Given(outputs.shape, targets.shape, integer, outputs.shape)
    return kinds.prepare(
        xp,
        options.loss,
        given,
        (outputs, targets),
        elementwise={"mse": mse, "huber": huber, "binary_cross_entropy": binary_cross_entropy},
        cross_entropy=cross_entropy,
        loss_terms=options.loss_terms,
    )


def mse(f: Any, y: Any) -> Any:
    """Mean squared error."""
    return anp.mean((f - y) ** 2)


def huber(f: Any, y: Any) -> Any:
    """Huber loss, delta = 1."""
    size = anp.abs(f - y)
    return anp.mean(anp.where(size < 1, 0.5 * size**2, size - 0.5))


def binary_cross_entropy(f: Any, y: Any) -> Any:
    """Of logits and labels or probabilities."""
    return anp.mean(anp.logaddexp(0, f) - f * y)


def cross_entropy(axis: int, labels: bool) -> Callable:
    """Of logits with their classes on this axis, here always the last, and labels or probabilities."""

    def of_labels(f: Any, y: Any) -> Any:
        kept = y != kinds.IGNORE_INDEX
        index = np.where(kept & (y >= 0) & (y < f.shape[-1]), y, 0)[..., None]
        chosen = anp.sum(anp.where(np.arange(f.shape[-1]) == index, f, 0.0), axis=-1)
        return anp.sum(kept * (logsumexp(f, axis=-1) - chosen)) / np.sum(kept)

    def of_probabilities(f: Any, y: Any) -> Any:
        return anp.mean(logsumexp(f, axis=-1) * anp.sum(y, axis=-1) - anp.sum(f * y, axis=-1))

    return of_labels if labels else of_probabilities


def snapshot(model: Model) -> Model:
    """The model as it is now, which `lnp.step_taken` compares with what it becomes."""
    return replace(model, parameters={name: np.array(array) for name, array in model.parameters.items()})


def difference(before: Model, after: Model) -> dict[str, np.ndarray]:
    """What an update has added to each parameter."""
    return {name: after.parameters[name] - array for name, array in before.parameters.items()}


def checked_update(model: Model, update: Any) -> dict[str, np.ndarray]:
    """The user's update, which has an array of the right shape for every parameter."""
    shapes = {name: np.shape(array) for name, array in model.parameters.items()}
    if not isinstance(update, Mapping) or {name: np.shape(update.get(name)) for name in shapes} != shapes:
        raise ValueError(
            f"The update does not match the parameters. Expected a dictionary of arrays of shapes {shapes}."
        )
    return {name: np.asarray(update[name]) for name in shapes}


def as_float(value: Any) -> Any:
    """A number for an array of shape (), anything else as it is."""
    return value.item() if isinstance(value, np.ndarray | np.generic) and value.shape == () else value
