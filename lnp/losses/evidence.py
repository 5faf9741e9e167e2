"""What a loss is called, and what a batch shows of it: a few rows of outputs, targets and loss gradient, for the host.

They come with the numbers of a measurement. `lnp.losses.doubts` looks at them there, for losses that are probably not
the ones that were meant.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lnp.contract.linearization import Array

ROWS = 32
"""Rows that are looked at."""
NUMBERS = 2**14
"""Numbers of each array that are looked at, more only where two rows have more."""
PLACES = 4
"""Samples that these rows are taken from where a sample has several."""
BATCH = 8
"""Samples from which on it means something that all targets are the same."""

Evidence = Mapping[str, tuple[Array, ...]]
"""{what is looked for: arrays of a few rows}."""


IN_WORDS = {
    "cross_entropy": "cross-entropy of logits",
    "binary_cross_entropy": "binary cross-entropy of logits",
    "mse": "mean squared error",
    "huber": "Huber loss",
}
"""lnp's own losses."""
OF_THE_MODEL, OF_THE_STEP = "the model's own loss", "the loss of the training step"


@dataclass(frozen=True)
class LossInputs:
    """What a loss is given, one array each, and what it takes them for.

    Attributes
    ----------
    outputs, targets:
        Arrays of the batch, in the shapes that the loss sees.
    integer:
        Whether the targets are labels.
    takes:
        "cross_entropy" and "binary_cross_entropy" (of logits), "probabilities", "binary_probabilities",
        "log_probabilities", "mse", "huber"; "" for a loss of which that is seen from its gradient alone.
    axis:
        The outputs' axis of classes.
    inferred:
        Whether nobody has named the loss.
    """

    outputs: Array
    targets: Array
    integer: bool
    takes: str = ""
    axis: int = -1
    inferred: bool = False

    @property
    def classes(self) -> int:
        """K of a row."""
        return int(self.outputs.shape[self.axis])

    @property
    def labels(self) -> bool:
        """Whether the targets are one label for each row."""
        shape = list(self.outputs.shape)
        del shape[self.axis]
        return self.integer and tuple(self.targets.shape) == tuple(shape)

    @property
    def alike(self) -> bool:
        """Whether outputs and targets have one shape."""
        return tuple(self.targets.shape) == tuple(self.outputs.shape)

    @property
    def one_each(self) -> bool:
        """Whether samples have one output and one target."""
        samples = self.outputs.shape[0]
        return samples > 2 and math.prod(self.outputs.shape) == samples == math.prod(self.targets.shape)


def described(
    loss: Any, takes: str, axis: int | None, arrays: tuple[Any, Any], single: bool, integer: bool
) -> tuple[str, LossInputs | None]:
    """(which loss it is, in words; what it is given, or None where outputs or targets are no single array).

    A library's loss that is wrapped in an object says both itself, by a method `loss_inputs(outputs, targets)`.

    Parameters
    ----------
    loss:
        The user's: a name, a callable, or None for one that was inferred.
    takes, axis, integer:
        As in `LossInputs`, where they are known; the axis of a loss that is not known is the one that labels leave out.
    arrays, single:
        (outputs, targets), and whether they are one array each.
    """
    if hasattr(type(loss), "loss_inputs"):
        return loss.loss_inputs(*arrays)
    name = (
        in_words(loss) if callable(loss) else IN_WORDS[takes] + (", inferred from the targets" if loss is None else "")
    )
    if not single:
        return name, None
    shape, aims = (tuple(array.shape) for array in arrays)
    if axis is None:
        axis = 1 if len(shape) > 2 and aims == shape[:1] + shape[2:] != shape[:-1] else -1
    return name, LossInputs(*arrays, integer, takes, axis, loss is None)


def _public(module: str | None, named: Any) -> str | None:
    """The module that offers this to users, where it is defined in one that is the library's own (keras.src)."""
    if module is None or ".src." not in module:
        return module
    parts = [part for part in module.split(".") if part != "src"]
    offered = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    found = (name for name in offered if getattr(sys.modules.get(name), named.__name__, None) is named)
    return next(found, module)


def in_words(loss: Callable) -> str:
    """The qualified name of a callable, or of its type.

    >>> in_words(math.hypot), in_words(functools.partial(math.hypot, 1.0))
    ('math.hypot', 'math.hypot')
    """
    while isinstance(loss, functools.partial):
        loss = loss.func
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    module = _public(getattr(named, "__module__", None), named)
    return named.__qualname__ if module in (None, "__main__", "builtins") else f"{module}.{named.__qualname__}"


def evidence(xp: Any, of: LossInputs | None, gradient: Array) -> Evidence:
    """What `lnp.losses.doubts.doubts` looks at, of a loss and its gradient. Pure, safe to trace and compile."""
    if of is None or len(of.outputs.shape) < 2 or math.prod(of.outputs.shape) != math.prod(gradient.shape):
        return {}
    f, y = of.outputs, of.targets
    found: dict[str, tuple[Array, ...]] = {}
    if of.takes in ("cross_entropy", "probabilities", "log_probabilities"):
        found[of.takes] = () if of.classes == 1 else (_rows(xp, f, of.axis),)
    elif of.takes in ("binary_cross_entropy", "binary_probabilities"):
        found[of.takes] = (_rows(xp, f, -1), *([_rows(xp, y, -1)] if of.alike else []))
    elif of.takes == "" and (of.labels or of.alike or of.one_each):
        g = xp.reshape(gradient, tuple(f.shape))
        rows = _rows(xp, f, of.axis), _rows(xp, g, of.axis), _rows(xp, y, of.axis if of.alike else None)
        pairs = of.one_each and not of.alike
        found["pairs" if pairs else "gradient"] = (*rows, xp.mean(xp.astype(y, f.dtype))) if pairs else rows
    if of.takes == "cross_entropy" and of.alike and not of.integer:
        found["class_probabilities"] = (_rows(xp, y, of.axis),)
    if of.takes == "mse" and of.inferred:
        seconds = [_rows(xp, y, 1)] if len(y.shape) > 2 else []
        found["whole_numbers" if of.classes == 1 else "one_hot"] = (_rows(xp, y, -1), *seconds)
    if f.shape[0] >= BATCH and (of.labels if of.takes == "cross_entropy" else of.takes == "mse" and of.inferred):
        found["constant"] = (xp.logical_not(xp.any(y != y[:1])), _rows(xp, y, None if of.labels else -1))
    return found


def _rows(xp: Any, array: Array, axis: int | None) -> Array:
    """(R, C) a few rows along an axis, evenly spaced, or (R,) a few entries without one: in the same places of arrays
    of one shape, and of labels without the axis.
    """
    several = len(array.shape) > (1 if axis is None else 2)
    some = array[:: max(1, array.shape[0] // (PLACES if several else ROWS))]
    if axis is not None and axis not in (-1, len(array.shape) - 1):
        some = xp.moveaxis(some, axis, -1)
    if several:  # before anything is copied, which reshaping does
        some = some[:, :: max(1, int(some.shape[1]) * PLACES // ROWS)]
    width = 1 if axis is None else int(some.shape[-1])
    flat = xp.reshape(some, (-1,) if axis is None else (-1, width))
    return flat[:: max(1, int(flat.shape[0]) // ROWS)][: min(ROWS, max(2, NUMBERS // width))]


def told(xp: Any, prepared: Any, gradient: Array) -> dict[str, Any]:
    """What a record tells of a prepared loss (`lnp.losses.kinds.Prepared`), as keywords of `Linearization`."""
    try:
        found = evidence(xp, prepared.inputs, gradient)
    except Exception:  # sparse, ragged and nested arrays have no rows to take: the user's own loss reads them itself
        found = {}
    return {"loss_name": prepared.name, "evidence": found}
