"""Losses that the user gives, and Keras's own, as losses that lnp takes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import keras
from keras.src.backend import set_keras_mask  # there is no public way to set one

from lnp.contract.trees import leaves
from lnp.losses.evidence import LossInputs, in_words
from lnp.losses.kinds import IGNORE_INDEX, NAMES, resolve
from lnp.state.preserve import reachable_objects
from lnp_keras.state_guard import FOREIGN, VARIABLE, Scope, unchanged

ELEMENTS = (
    *("MeanSquaredError", "MeanAbsoluteError", "MeanAbsolutePercentageError", "MeanSquaredLogarithmicError"),
    *("Huber", "LogCosh", "Hinge", "SquaredHinge", "Poisson", "BinaryCrossentropy", "BinaryFocalCrossentropy"),
    *("mean_squared_error", "mean_absolute_error", "mean_absolute_percentage_error", "mean_squared_logarithmic_error"),
    *("huber", "log_cosh", "hinge", "squared_hinge", "poisson", "binary_crossentropy", "binary_focal_crossentropy"),
)
"""Losses that average over all elements of the outputs."""
ROWS = (
    *("CategoricalCrossentropy", "CategoricalFocalCrossentropy", "SparseCategoricalCrossentropy", "KLDivergence"),
    *("CosineSimilarity", "CategoricalHinge", "categorical_crossentropy", "categorical_focal_crossentropy"),
    *("sparse_categorical_crossentropy", "kl_divergence", "cosine_similarity", "categorical_hinge"),
)
"""Losses that average over rows, one for each vector along the last axis of the outputs."""
CLASSES = ("categoricalcrossentropy", "sparsecategoricalcrossentropy", "categoricalfocalcrossentropy")
BINARY = ("binarycrossentropy", "binaryfocalcrossentropy")
TAKES = (
    dict.fromkeys(CLASSES, "probabilities") | dict.fromkeys(BINARY, "binary_probabilities"),
    dict.fromkeys(CLASSES, "cross_entropy") | dict.fromkeys(BINARY, "binary_cross_entropy"),
)
"""{loss in small letters: what it takes outputs for}, without and with `from_logits`."""
HELD = "values of variables"
"""Under which name they come with the targets."""
WEIGHTED = "sample weights scale the terms of the loss, which are counted as without them"


@dataclass(frozen=True)
class KerasLoss:
    """One of Keras's losses, which takes (targets, outputs), as a loss (outputs, targets) -> scalar.

    Targets may be a dictionary with "targets", "sample_weight", and `HELD`, the values of `held_variables`.
    """

    loss: Any

    def __call__(self, outputs: Any, targets: Any) -> Any:
        with unchanged(self.loss), replaced(self.variables, targets):
            return self.value(opened(outputs), targets)

    def value(self, outputs: Any, targets: Any) -> Any:
        """The loss, which may write to what it holds."""
        return plain_value(self.loss, outputs, *weighted(targets))

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that it may read."""
        return held_variables([self.loss])

    @property
    def separable(self) -> bool:
        """Whether it is a mean over samples."""
        return _count_by(self.loss) is not None and _reduction(self.loss) in MEANS

    def loss_terms(self, outputs: Any, targets: Any) -> tuple[Any, tuple[str, ...]]:
        """n, and notes on it."""
        return terms_of(self.loss, outputs, targets)

    def sample_terms(self, outputs: Any, targets: Any) -> Any:
        """What each sample weighs in the mean, (N,), or None where all weigh the same."""
        return sample_terms_of(self.loss, outputs, targets)

    def loss_inputs(self, outputs: Any, targets: Any) -> tuple[str, LossInputs | None]:
        """Its name, and what it is given."""
        return inputs_of(self.loss, outputs, weighted(targets)[0])


@dataclass(frozen=True)
class OwnLoss:
    """A loss (outputs, targets) -> scalar of the user's own, which finds its state at each call as it was before.

    What else it offers, such as `loss_terms` or `separable`, is that of the user's.
    """

    loss: Callable

    def __call__(self, outputs: Any, targets: Any) -> Any:
        with unchanged(self.loss), replaced(self.variables, targets):
            return self.value(opened(outputs), targets)

    def value(self, outputs: Any, targets: Any) -> Any:
        """The loss, which may write to what it holds."""
        return self.loss(outputs, _as_given(targets))

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that it may read."""
        return held_variables([self.loss])

    def loss_inputs(self, outputs: Any, targets: Any) -> tuple[str, LossInputs | None]:
        """Its name, and what it is given."""
        return inputs_of(self.loss, outputs, _as_given(targets))

    def __getattr__(self, name: str) -> Any:
        if name == "loss":  # while it is copied, before it has one
            raise AttributeError(name)
        own = getattr(self.loss, name)
        counts = name in ("loss_terms", "sample_terms")
        return own if not counts else lambda outputs, targets: own(bare(outputs), _as_given(targets))


def held_variables(roots: Iterable[Any]) -> list[keras.Variable]:
    """The variables that can be reached from a loss.

    JAX would take their values for constants of what it traces; they come with the targets there.
    """
    return [x for x in reachable_objects(roots, FOREIGN) if isinstance(x, VARIABLE)]


def replaced(variables: list[keras.Variable], targets: Any) -> Scope:
    """A scope that drops what a loss writes, with the values of variables that came with the targets."""
    given = targets.get(HELD) if isinstance(targets, dict) else None
    return Scope([] if given is None else list(zip(variables, given, strict=True)))


def _as_given(targets: Any) -> Any:
    """The user's own targets."""
    return targets["targets"] if isinstance(targets, dict) and HELD in targets else targets


AUTOMATIC = ("crossentropy", "ce")
"""Names for a cross-entropy whose kind follows from the shapes."""
MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


def adapted(loss: Any) -> Any:
    """A loss of Keras, or its name, as one that lnp takes; anything else as it is."""
    if isinstance(loss, str) and loss not in NAMES:
        with contextlib.suppress(ValueError):
            return KerasLoss(keras.losses.get(loss))
        return loss
    if isinstance(loss, keras.losses.Loss) or getattr(loss, "__module__", "").startswith("keras."):
        return KerasLoss(loss)
    return OwnLoss(loss) if callable(loss) else loss


def plain_value(loss: Any, outputs: Any, targets: Any, weight: Any) -> Any:
    """The value of one of Keras's losses."""
    if isinstance(loss, keras.losses.Loss):
        return loss(targets, outputs, sample_weight=weight)
    return keras.ops.mean(loss(targets, outputs))


def terms_of(loss: Any, outputs: Any, targets: Any) -> tuple[Any, tuple[str, ...]]:
    """n of one of Keras's losses, and notes on it."""
    shape = tuple(leaves(bare(outputs))[0].shape)
    _, weight = weighted(targets)
    notes = () if weight is None else (WEIGHTED,)
    if _reduction(loss) == "sum":
        return 1, (*notes, "the loss is a sum, which averages over nothing: loss_terms is 1")
    by = _count_by(loss)
    if by is None:
        return shape[0], (*notes, "loss_terms counts the samples, which is assumed for this loss; pass loss_terms=")
    rows, each = math.prod(shape[:-1]), shape[-1] if by == "elements" else 1
    kept = _kept_rows(loss, outputs, targets, shape)
    return (rows * each if kept is None else keras.ops.sum(keras.ops.cast(kept, "int32")) * each), notes


def sample_terms_of(loss: Any, outputs: Any, targets: Any) -> Any:
    """What each sample weighs in the mean of one of Keras's losses, (N,); None where all weigh the same.

    Sample weights count where the mean is divided by them, and else scale the terms.
    """
    if _count_by(loss) is None or _reduction(loss) not in MEANS:
        return None
    shape = tuple(leaves(bare(outputs))[0].shape)
    kept, (_, weight) = _kept_rows(loss, outputs, targets, shape), weighted(targets)
    divided = weight is not None and _reduction(loss) == "mean_with_sample_weight"
    if kept is None and not divided:
        return None
    rows = keras.ops.ones(shape[:-1]) if kept is None else keras.ops.cast(kept, "float32")
    if divided:
        sizes = tuple(weight.shape)[: len(rows.shape)]  # a last axis of 1 may be one too many
        weight = keras.ops.reshape(keras.ops.cast(weight, "float32"), (*sizes, *[1] * (len(rows.shape) - len(sizes))))
        rows = rows * weight
    return keras.ops.sum(keras.ops.reshape(rows, (shape[0], -1)), axis=1)


def _kept_rows(loss: Any, outputs: Any, targets: Any, shape: tuple) -> Any:
    """Which rows a mask or ignored labels leave, or None for all."""
    masks = outputs["masks"] if _is_masked(outputs) else [None]
    ignored = getattr(loss, "ignore_class", None)
    y, _ = weighted(targets)
    kept = [] if masks[0] is None else [keras.ops.broadcast_to(masks[0], shape[:-1])]
    kept += [] if ignored is None else [keras.ops.reshape(y, shape[:-1]) != ignored]
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else keras.ops.logical_and(*kept)


def _count_by(loss: Any) -> str | None:
    name = getattr(loss, "__name__", type(loss).__name__)
    return "elements" if name in ELEMENTS else "rows" if name in ROWS else None


def inputs_of(loss: Any, outputs: Any, targets: Any) -> tuple[str, LossInputs | None]:
    """(A loss's name, what it is given where that is one array each)."""
    name, given = in_words(loss), leaves(bare(outputs))
    if len(given) != 1 or not keras.ops.is_tensor(targets):
        return name, None
    shape, integer = tuple(given[0].shape), "int" in keras.backend.standardize_dtype(targets.dtype)
    if integer and tuple(targets.shape) == (*shape[:-1], 1):
        targets = keras.ops.squeeze(targets, -1)
    kind = getattr(loss, "__name__", type(loss).__name__).replace("_", "").lower()
    takes = TAKES[bool(getattr(loss, "from_logits", False))].get(kind, "")
    return name, LossInputs(given[0], targets, integer, takes)


def _reduction(loss: Any) -> str:
    return getattr(loss, "reduction", "sum_over_batch_size")


def resolved(identity: Any, outputs: Any, targets: Any) -> Any:
    """The loss that a name stands for, of which some follow from the shapes."""
    if isinstance(identity, str) and identity.lower() in AUTOMATIC:
        y, shape = weighted(targets)[0], tuple(leaves(bare(outputs))[0].shape)
        sparse = len(y.shape) < len(shape) or y.shape[-1] != shape[-1]
        identity = "binary_crossentropy" if shape[-1] == 1 else f"{'sparse_' * sparse}categorical_crossentropy"
    return keras.losses.get(identity)


def weighted(targets: Any) -> tuple[Any, Any]:
    """(targets, sample weights or None)."""
    if isinstance(targets, dict) and "sample_weight" in targets:
        return targets["targets"], targets["sample_weight"]
    return targets, None


def _is_masked(outputs: Any) -> bool:
    return isinstance(outputs, dict) and set(outputs) == {"outputs", "masks"}


def bare(outputs: Any) -> Any:
    """The outputs without the masks that came with them."""
    return outputs["outputs"] if _is_masked(outputs) else outputs


def opened(outputs: Any) -> Any:
    """The outputs as the model returned them, with their masks attached."""
    if not _is_masked(outputs):
        return outputs
    for leaf, mask in zip(leaves(outputs["outputs"]), outputs["masks"], strict=True):
        if mask is not None:
            set_keras_mask(leaf, mask)
    return outputs["outputs"]


def named_loss(name: str | None, outputs: Any, targets: Any) -> Any:
    """One of lnp's losses by name, or the one that is inferred, in Keras's operations.

    Labels are right and no others than those that are ignored are out of range: a measurement has seen to it.
    """
    targets, kind = keras.ops.convert_to_tensor(targets), keras.backend.standardize_dtype
    integer = not keras.backend.is_float_dtype(kind(targets.dtype))
    meant = resolve(name, tuple(outputs.shape), tuple(targets.shape), integer)
    outputs = outputs if kind(outputs.dtype) == "float64" else keras.ops.cast(outputs, "float32")
    if meant == "cross_entropy" and integer:
        kept = keras.ops.cast(targets != IGNORE_INDEX, outputs.dtype)
        labels = keras.ops.where(targets == IGNORE_INDEX, keras.ops.zeros_like(targets), targets)
        terms = keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True)
        return keras.ops.sum(kept * terms) / keras.ops.sum(kept)
    targets = keras.ops.cast(targets, outputs.dtype)
    if meant == "cross_entropy":
        return keras.ops.mean(keras.losses.categorical_crossentropy(targets, outputs, from_logits=True))
    if meant == "binary_cross_entropy":
        return keras.ops.mean(keras.losses.binary_crossentropy(targets, outputs, from_logits=True))
    one = keras.losses.huber if meant == "huber" else keras.losses.mean_squared_error
    return keras.ops.mean(one(targets, outputs))
