"""Values and gradients of the losses with respect to the outputs, by formula."""

from __future__ import annotations

import numpy as np

from lnp import losses
from lnp.batches import check_loss


def value_and_gradient(loss, outputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(L, dL/df) for "cross_entropy", "mse", or a callable that returns both."""
    if loss == "mse":
        losses.check_same_shape(outputs.shape, targets.shape)
        difference = outputs - targets
        return np.mean(difference**2), 2 * difference / difference.size
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


def _cross_entropy(outputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    integer = np.issubdtype(targets.dtype, np.integer)
    losses.class_axis(outputs.shape, targets.shape, integer)
    shifted = outputs - outputs.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    if integer:
        kept = targets != losses.IGNORE_INDEX
        terms = kept.sum()
        weights = (np.arange(outputs.shape[-1]) == targets[..., None]) & kept[..., None]
    else:
        weights, terms = targets, targets[..., 0].size
    gradient = (np.exp(log_p) * weights.sum(axis=-1, keepdims=True) - weights) / np.maximum(terms, 1)
    value = -np.sum(np.where(weights != 0, weights * log_p, 0)) / terms if terms else np.asarray(np.nan)
    return np.asarray(value), gradient.astype(outputs.dtype)
