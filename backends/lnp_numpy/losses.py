"""Values and gradients of the losses with respect to the outputs, by formula."""

from __future__ import annotations

import numpy as np

from lnp.contract.validation import check_loss
from lnp.losses import kinds


def value_and_gradient(loss, outputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(L, dL/df) for one of lnp's losses by name, or a callable that returns both."""
    if loss in kinds.ELEMENTWISE:
        kinds.check_same_shape(outputs.shape, targets.shape)
        value, gradient = ELEMENTWISE[loss](outputs, targets.astype(outputs.dtype))
        return np.mean(value), gradient / gradient.size
    if loss == "cross_entropy":
        return _cross_entropy(outputs, targets)
    answer = loss(outputs, targets)
    if not (isinstance(answer, tuple) and len(answer) == 2):
        raise TypeError(
            f"The loss returned {type(answer).__name__}. NumPy cannot differentiate: expected a pair (loss, gradient "
            "with respect to the outputs)."
        )
    value, gradient = np.asarray(answer[0]), np.asarray(answer[1])
    check_loss(value.shape)
    if gradient.shape != outputs.shape:
        raise ValueError(f"The loss gradient has shape {gradient.shape}. Expected the outputs' shape {outputs.shape}.")
    return value, gradient


def _mse(outputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (outputs - targets) ** 2, 2 * (outputs - targets)


def _huber(outputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    error = outputs - targets
    distance = np.abs(error)
    return np.where(distance < 1, 0.5 * error**2, distance - 0.5), np.clip(error, -1, 1)


def _binary_cross_entropy(outputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(1 + e^f) - y f without overflow."""
    probability = 0.5 * (1 + np.tanh(0.5 * outputs))
    return np.logaddexp(0, outputs) - targets * outputs, probability - targets


ELEMENTWISE = {"mse": _mse, "huber": _huber, "binary_cross_entropy": _binary_cross_entropy}
"""(outputs, targets) -> (terms, their derivatives)."""


def _cross_entropy(outputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean cross-entropy over labels that are not ignored, and its gradient in the outputs."""
    integer = np.issubdtype(targets.dtype, np.integer)
    kinds.class_axis(outputs.shape, targets.shape, integer)
    shifted = outputs - outputs.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    if integer:
        kept = targets != kinds.IGNORE_INDEX
        terms = kept.sum()
        weights = (np.arange(outputs.shape[-1]) == targets[..., None]) & kept[..., None]
    else:
        weights, terms = targets, targets[..., 0].size
    gradient = (np.exp(log_p) * weights.sum(axis=-1, keepdims=True) - weights) / np.maximum(terms, 1)
    value = -np.sum(np.where(weights != 0, weights * log_p, 0)) / terms if terms else np.asarray(np.nan)
    return np.asarray(value), gradient.astype(outputs.dtype)
