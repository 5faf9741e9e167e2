"""Losses that are probably not the ones that were meant: probabilities taken for logits, classes that are regressed.

What a loss does with its outputs is seen from its gradient, so that losses of the user's own are looked at as well:
that of a cross-entropy of logits is softmax(f) - y, and no other's. NumPy looks at the few rows that
`lnp.losses.evidence` has brought to the host. A note says what was seen, and how to say that it is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

SUM = 5e-3
"""How far probabilities in narrow types may be from the sum 1; the rows of soft targets likewise."""
SAME = 1e-3
"""Relative difference up to which a loss gradient has the form that is looked for."""
ENOUGH = 16
"""Outputs of a sigmoid from which on it shows that they are none of logits."""
MOST_CLASSES = 1000

TWICE = (
    "the outputs are rows of probabilities, and the loss, a cross-entropy of logits, takes their softmax once more: "
    "pass logits, without the last softmax, or a loss of probabilities"
)
TWICE_BINARY = (
    "all outputs are between 0 and 1, as probabilities are, and the loss, a binary cross-entropy of logits, takes "
    "their sigmoid once more: pass logits, without the last sigmoid, or a loss of probabilities"
)
NO_PROBABILITIES = (
    "outputs are not between 0 and 1, and the loss takes probabilities, which it clips: pass a loss of logits "
    "(from_logits=True), or end the model with a softmax or sigmoid"
)
NO_LOGARITHMS = (
    "the exponentials of the outputs do not add up to 1, and the loss takes logarithms of probabilities: pass a "
    "cross-entropy of logits, or end the model with log_softmax"
)
ONE_COLUMN = (
    "the outputs have a single class, of which the cross-entropy is 0 whatever the network does: give one output to "
    'each class, or pass loss="binary_cross_entropy" with float targets, or another loss'
)
ONE_HOT = (
    "no loss was named, and the targets, one-hot rows, are regressed by mean squared error: for classes pass "
    'loss="cross_entropy" or integer labels, and loss="mse" if this is what was meant'
)
WHOLE_NUMBERS = (
    "no loss was named, and the targets, whole numbers that come again, are regressed by mean squared error: for "
    'classes pass integer labels and one output for each class, and loss="mse" if this is what was meant'
)
NO_SOFT_LABELS = (
    "rows of the targets do not add up to 1, or hold negative numbers, and the cross-entropy takes them for "
    'probabilities of classes: normalise them, or pass loss="binary_cross_entropy" where several classes may be true'
)
NO_BINARY_LABELS = (
    "targets are not between 0 and 1, and the binary cross-entropy takes them for labels or probabilities: bring them "
    "there, such as (targets + 1) / 2 for -1 and 1"
)
CONSTANT = "all samples have the same target: what is measured is how a constant is learned; shuffle, if not meant"
PAIRS = (
    "outputs of shape (N, 1) and targets of shape (N,), or the other way round, are broadcast by the squared error, "
    "which compares each output with all targets: reshape one of them"
)


def doubts(evidence: Mapping[str, tuple]) -> tuple[str, ...]:
    """Notes on a loss from rows of its outputs, targets and gradient, see `lnp.losses.evidence`.

    >>> probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    >>> [note[:38] for note in doubts({"cross_entropy": (probabilities,)})]
    ['the outputs are rows of probabilities,']
    >>> doubts({"cross_entropy": (np.log(probabilities),)})
    ()
    """
    with np.errstate(all="ignore"):
        arrays = {name: [np.asarray(rows, dtype=float) for rows in given] for name, given in evidence.items()}
        found = [CHECKS[name](*given) for name, given in arrays.items()]
    return tuple(note for note in found if note)


def _cross_entropy(outputs: np.ndarray | None = None) -> str:
    """Whether outputs that are taken for logits are probabilities."""
    if outputs is None:
        return ONE_COLUMN
    return TWICE if _are_probabilities(outputs) else ""


def _probabilities(outputs: np.ndarray | None = None, targets: np.ndarray | None = None) -> str:
    """Whether outputs that are taken for probabilities are none."""
    if outputs is None:
        return ONE_COLUMN
    return NO_PROBABILITIES if outputs.min() < -SUM or outputs.max() > 1 + SUM else ""


def _log_probabilities(outputs: np.ndarray | None = None) -> str:
    """Whether outputs that are taken for logarithms of probabilities are none."""
    if outputs is None:
        return ONE_COLUMN
    return NO_LOGARITHMS if (np.abs(np.exp(outputs).sum(axis=1) - 1) > 2 * SUM).any() else ""


def _binary_cross_entropy(outputs: np.ndarray, targets: np.ndarray | None = None) -> str:
    """Whether outputs that are taken for logits come from a sigmoid, or the targets are none of two classes."""
    if targets is not None and (targets.min() < 0 or targets.max() > 1):
        return NO_BINARY_LABELS
    # logits that are all positive and near zero come about by chance, none of 1/2 and more
    between = outputs.size >= ENOUGH and outputs.min() >= 0 and 0.5 <= outputs.max() <= 1
    return TWICE_BINARY if between else ""


def _class_probabilities(targets: np.ndarray) -> str:
    """Whether soft targets are no probabilities; a row of zeros is one that is left out."""
    sums = targets.sum(axis=1)
    wrong = (np.abs(sums - 1) > 2 * SUM) & (targets.max(axis=1) > 0)
    return NO_SOFT_LABELS if wrong.any() or targets.min() < 0 else ""


def _one_hot(*targets: np.ndarray) -> str:
    """Whether targets that are regressed are one-hot rows along some axis."""
    return ONE_HOT if any(_are_one_hot(rows) for rows in targets) else ""


def _are_one_hot(rows: np.ndarray) -> bool:
    return len(rows) > 1 and bool(((rows == 0) | (rows == 1)).all() and (rows.sum(axis=1) == 1).all())


def _whole_numbers(targets: np.ndarray, *others: np.ndarray) -> str:
    """Whether targets of one output are indices of three classes or more."""
    kinds = len(np.unique(targets))
    whole = bool((targets == np.floor(targets)).all()) and targets.min() >= 0 and targets.max() < MOST_CLASSES
    return WHOLE_NUMBERS if whole and 2 < kinds <= targets.size // 2 else ""


def _constant(same: np.ndarray, targets: np.ndarray) -> str:
    """Whether all samples have one target. Zeros may be a residual, ignored labels are told elsewhere."""
    told = targets.flat[0] >= 0 if targets.ndim == 1 else targets.any()
    return CONSTANT if same and told else ""


def _gradient(outputs: np.ndarray, gradient: np.ndarray, targets: np.ndarray) -> str:
    """Whether a loss of the user's own turns out to be a cross-entropy of logits, and is given probabilities."""
    some = min(len(outputs), len(targets))
    outputs, gradient, targets = outputs[:some], gradient[:some], targets[:some]
    if targets.ndim == 1:
        kept = (targets >= 0) & (targets < outputs.shape[1])
        outputs, gradient = outputs[kept], gradient[kept]
        targets = (targets[kept, None] == np.arange(outputs.shape[1])).astype(float)
    if not outputs.size or _proportional(gradient, outputs - targets):
        return ""
    if _are_probabilities(outputs):
        exponentials = np.exp(outputs)
        softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
        return TWICE if _proportional(gradient, softmax - targets) else ""
    sigmoid = 1 / (1 + np.exp(-outputs))
    return _binary_cross_entropy(outputs) if _proportional(gradient, sigmoid - targets) else ""


def _pairs(outputs: np.ndarray, gradient: np.ndarray, targets: np.ndarray, mean: np.ndarray) -> str:
    """Whether the gradient is that of a squared error between all outputs and all targets, which is f_n - mean(y)."""
    f, g, y = (rows.ravel()[: min(outputs.size, targets.size)] for rows in (outputs, gradient, targets))
    if _proportional(g, f - mean) and not _proportional(g, f - y):
        return PAIRS
    return _gradient(f[:, None], g[:, None], y[:, None])


def _are_probabilities(rows: np.ndarray) -> bool:
    """Whether rows of several numbers are none below zero and add up to 1."""
    within = rows.shape[1] > 1 and rows.min() >= 0
    return bool(within and (np.abs(rows.sum(axis=1) - 1) <= SUM).all())


def _proportional(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a = s b with s > 0, up to rounding; not of zeros."""
    square = float(np.sum(b * b))
    s = float(np.sum(a * b)) / square if square > 0 else 0.0
    return s > 0 and float(np.linalg.norm(a - s * b)) <= SAME * float(np.linalg.norm(a))


CHECKS: dict[str, Callable[..., str]] = {
    "cross_entropy": _cross_entropy,
    "probabilities": _probabilities,
    "binary_probabilities": _probabilities,
    "log_probabilities": _log_probabilities,
    "binary_cross_entropy": _binary_cross_entropy,
    "class_probabilities": _class_probabilities,
    "one_hot": _one_hot,
    "whole_numbers": _whole_numbers,
    "constant": _constant,
    "gradient": _gradient,
    "pairs": _pairs,
}
"""{what is looked for: how}."""
