"""The loss that a model was compiled with, and Keras's own losses, as losses that lnp takes."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
from keras.src.backend import set_keras_mask  # there is no public way to set one

from lnp.contract.trees import leaves
from lnp.losses.kinds import IGNORE_INDEX, NAMES, resolve
from lnp_keras.state_guard import Scope, unchanged

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
WEIGHTED = "sample weights scale the terms of the loss, which are counted as without them"


@dataclass(frozen=True)
class KerasLoss:
    """One of Keras's losses, which takes (targets, outputs), as a loss (outputs, targets) -> scalar.

    Targets may be a dictionary with "targets" and "sample_weight".
    """

    loss: Any

    def __call__(self, outputs: Any, targets: Any) -> Any:
        with unchanged(self.loss), Scope([]):
            return plain_value(self.loss, _opened(outputs), *_weighted(targets))

    @property
    def separable(self) -> bool:
        """Whether it is a mean over samples."""
        return _count_by(self.loss) is not None and _reduction(self.loss) in MEANS

    def loss_terms(self, outputs: Any, targets: Any) -> tuple[Any, tuple[str, ...]]:
        """n, and notes on it."""
        return _terms(self.loss, outputs, targets)


@dataclass(frozen=True)
class OwnLoss:
    """A loss (outputs, targets) -> scalar of the user's own, which finds its state at each call as it was before.

    What else it offers, such as `loss_terms` or `separable`, is that of the user's.
    """

    loss: Callable

    def __call__(self, outputs: Any, targets: Any) -> Any:
        with unchanged(self.loss), Scope([]):
            return self.loss(outputs, targets)

    def __getattr__(self, name: str) -> Any:
        if name == "loss":  # while it is copied, before it has one
            raise AttributeError(name)
        return getattr(self.loss, name)


@dataclass(frozen=True)
class CompiledLoss:
    """What `fit` minimises: the model's `compute_loss`, without the terms that do not come from the outputs.

    Targets are a dictionary with "inputs", "targets" and "sample_weight".

    Attributes
    ----------
    model:
        Weak reference to it.
    identity:
        What it was compiled with for its only output, or None for several.
    compiled:
        Weak reference to what `compile` made of it, which a second `compile` replaces.
    """

    model: weakref.ref
    identity: Any
    compiled: Any

    def __call__(self, outputs: Any, targets: Any) -> Any:
        model: Any = self.model()
        outputs, (y, weight) = _opened(outputs), _weighted(targets)
        with unchanged(model), _built(model), Scope([]):
            if not overridden(model):
                model._losses_override = [keras.ops.zeros(())]
            return model.compute_loss(x=targets["inputs"], y=y, y_pred=outputs, sample_weight=weight, training=True)

    @property
    def separable(self) -> bool:
        """Whether it is a mean over samples."""
        if overridden(self.model()) or self.identity is None:
            return False
        known = isinstance(self.identity, str) and self.identity.lower() in AUTOMATIC
        return known or KerasLoss(keras.losses.get(self.identity)).separable

    def loss_terms(self, outputs: Any, targets: Any) -> tuple[Any, tuple[str, ...]]:
        """n, and notes on it."""
        if overridden(self.model()) or self.identity is None:
            samples = leaves(bare(outputs))[0].shape[0]
            return samples, ("loss_terms counts the samples, which is assumed for this loss; pass loss_terms=",)
        return _terms(_resolved(self.identity, outputs, targets), outputs, targets)


def compiled_loss(model: Any) -> CompiledLoss:
    """The loss of a compiled model."""
    single = not isinstance(model.loss, dict | list | tuple)
    made = getattr(model, "_compile_loss", None)
    return CompiledLoss(weakref.ref(model), model.loss if single else None, None if made is None else weakref.ref(made))


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


def overridden(model: Any) -> bool:
    """Whether the user's class computes its loss in a way of its own."""
    return type(model).compute_loss is not keras.Model.compute_loss


def _terms(loss: Any, outputs: Any, targets: Any) -> tuple[Any, tuple[str, ...]]:
    shape = tuple(leaves(bare(outputs))[0].shape)
    _, weight = _weighted(targets)
    notes = () if weight is None else (WEIGHTED,)
    if _reduction(loss) == "sum":
        return 1, (*notes, "the loss is a sum, which averages over nothing: loss_terms is 1")
    by = _count_by(loss)
    if by is None:
        return shape[0], (*notes, "loss_terms counts the samples, which is assumed for this loss; pass loss_terms=")
    rows, each = math.prod(shape[:-1]), shape[-1] if by == "elements" else 1
    valid = _valid_rows(loss, outputs, targets, shape)
    return (rows * each if valid is None else valid * each), notes


def _valid_rows(loss: Any, outputs: Any, targets: Any, shape: tuple) -> Any:
    """How many rows a mask or ignored labels leave, or None for all."""
    masks = outputs["masks"] if _is_masked(outputs) else [None]
    ignored = getattr(loss, "ignore_class", None)
    y, _ = _weighted(targets)
    kept = [] if masks[0] is None else [keras.ops.broadcast_to(masks[0], shape[:-1])]
    kept += [] if ignored is None else [keras.ops.reshape(y, shape[:-1]) != ignored]
    if not kept:
        return None
    both = kept[0] if len(kept) == 1 else keras.ops.logical_and(*kept)
    return keras.ops.sum(keras.ops.cast(both, "int32"))


def _count_by(loss: Any) -> str | None:
    name = getattr(loss, "__name__", type(loss).__name__)
    return "elements" if name in ELEMENTS else "rows" if name in ROWS else None


def _reduction(loss: Any) -> str:
    return getattr(loss, "reduction", "sum_over_batch_size")


def _resolved(identity: Any, outputs: Any, targets: Any) -> Any:
    if isinstance(identity, str) and identity.lower() in AUTOMATIC:
        y, shape = _weighted(targets)[0], tuple(leaves(bare(outputs))[0].shape)
        sparse = len(y.shape) < len(shape) or y.shape[-1] != shape[-1]
        identity = "binary_crossentropy" if shape[-1] == 1 else f"{'sparse_' * sparse}categorical_crossentropy"
    return keras.losses.get(identity)


def _weighted(targets: Any) -> tuple[Any, Any]:
    if isinstance(targets, dict) and "sample_weight" in targets:
        return targets["targets"], targets["sample_weight"]
    return targets, None


def _is_masked(outputs: Any) -> bool:
    return isinstance(outputs, dict) and set(outputs) == {"outputs", "masks"}


def bare(outputs: Any) -> Any:
    """The outputs without the masks that came with them."""
    return outputs["outputs"] if _is_masked(outputs) else outputs


def _opened(outputs: Any) -> Any:
    """The outputs as the model returned them, with their masks attached."""
    if not _is_masked(outputs):
        return outputs
    for leaf, mask in zip(leaves(outputs["outputs"]), outputs["masks"], strict=True):
        if mask is not None:
            set_keras_mask(leaf, mask)
    return outputs["outputs"]


def is_ready(model: Any) -> bool:
    """Whether the model's loss has been used before, or needs no preparation."""
    compiled = getattr(model, "_compile_loss", None)
    return compiled is None or compiled.built or compiled in _BUILT


def build(model: Any, outputs: Any, targets: Any, weight: Any) -> None:
    """Prepare a loss that the model has not used yet, outside of any trace.

    Keras builds it at its first use, with variables for the values of several losses. The model's own is left as it is:
    another one with the same settings is built.
    """
    compiled = model._compile_loss
    other = type(compiled)(
        compiled._user_loss, compiled._user_loss_weights, compiled.reduction, output_names=compiled.output_names
    )
    other(targets, outputs, weight)
    _BUILT[compiled] = other


_BUILT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _built(model: Any) -> Iterator[None]:
    """The model with a loss that is ready."""
    own = getattr(model, "_compile_loss", None)
    if own is None or own.built or own not in _BUILT:
        yield
        return
    try:
        vars(model)["_compile_loss"] = _BUILT[own]
        yield
    finally:
        vars(model)["_compile_loss"] = own


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
