"""Parts of a batch: the samples of a slice, whatever containers hold them.

Which arrays run over the samples is read from their shapes alone, so that what could be read in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lnp.arguments import Batch
from lnp.contract.trees import leaves, map_leaves

REMEDY = "Cut the batch yourself, and call lnp.decompose for each part, or lnp.gradient_gram with a list of them."
PLAIN = (bool, int, float, complex, str, bytes, type(None))


def samples_of(batch: Batch) -> int:
    """N, the common length of the targets along their first axis; of a dictionary's arrays, where it is one.

    >>> import numpy
    >>> samples_of((numpy.zeros((5, 2)), numpy.zeros(5)))
    5

    Raises
    ------
    ValueError
        If they have no length in common.
    """
    pair = isinstance(batch, list | tuple) and len(batch) == 2
    targets = batch[1] if pair else batch
    if isinstance(batch, Mapping) and "labels" in batch:
        targets = batch["labels"]
    lengths = sorted({shape[0] for leaf in leaves(targets) if (shape := _shape(leaf))})
    if len(lengths) != 1:
        found = f"of lengths {lengths} along their first axis" if lengths else f"of type {type(targets).__name__}"
        raise ValueError(
            f"The batch is to be cut into parts, and its targets are {found}. Expected arrays with the sample axis "
            f"first. {REMEDY}"
        )
    return lengths[0]


def part(batch: Batch, rows: slice, samples: int) -> Batch:
    """The batch with some of its samples, in containers of the same kinds; nothing of the batch is changed.

    >>> import numpy
    >>> part(({"x": numpy.arange(6).reshape(3, 2), "scale": 2.0}, numpy.arange(3)), slice(0, 2), 3)
    ({'x': array([[0, 1],
           [2, 3]]), 'scale': 2.0}, array([0, 1]))

    Raises
    ------
    ValueError
        For a batch with arrays of which it cannot be told whether they run over the samples, and with other objects.
    """
    pair = isinstance(batch, list | tuple) and len(batch) == 2
    inputs = leaves(batch[0] if pair else batch)
    arrays = [shape for leaf in inputs if (shape := _shape(leaf))]
    others = [shape for shape in arrays if shape[0] not in (samples, 1)]
    square = [shape for shape in arrays if len(arrays) > 1 and samples > 1 and shape[:2] == (samples, samples)]
    if others or square or all(shape[0] != samples for shape in arrays):
        what = f"arrays of shapes {arrays}" if arrays else "no arrays"
        raise ValueError(
            f"The batch of {samples} samples is to be cut into parts, and its inputs hold {what}. Expected arrays of "
            f"which each runs over the samples along its first axis alone. {REMEDY}"
        )
    return map_leaves(lambda leaf: _rows(leaf, rows, samples), batch)


def _rows(leaf: Any, rows: slice, samples: int) -> Any:
    """The rows of an array that runs over the samples; other arrays and plain values as they are."""
    shape = _shape(leaf)
    if isinstance(leaf, PLAIN) or (shape is not None and (not shape or shape[0] != samples)):
        return leaf
    try:
        return leaf[rows]
    except Exception as error:  # no array, or one of a kind that has no slices
        raise ValueError(
            f"The batch is to be cut into parts, and holds a {type(leaf).__name__}, which has no slices. Expected "
            f"arrays with the sample axis first, in dictionaries, lists, tuples or dataclasses. {REMEDY}"
        ) from error


def _shape(leaf: Any) -> tuple[int, ...] | None:
    """The shape of an array, () for a single number, None for what has none."""
    shape = getattr(leaf, "shape", None)
    return None if shape is None or isinstance(leaf, type) else tuple(shape)
