"""What `fit` minimises: the compiled loss of the outputs, and with what layers and regularisers add the whole of it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras

from lnp.contract.trees import leaves
from lnp.losses.evidence import LossInputs, in_words
from lnp_keras.losses import (
    AUTOMATIC,
    KerasLoss,
    OwnLoss,
    bare,
    held_variables,
    inputs_of,
    opened,
    replaced,
    resolved,
    sample_terms_of,
    terms_of,
    weighted,
)
from lnp_keras.model import Stateless
from lnp_keras.state_guard import unchanged
from lnp_keras.strategies import as_one_replica

STEP = ("train_step", "make_train_function", "compute_loss_and_updates", "stateless_compute_loss", "_compute_loss")
"""Methods that a step of `fit` consists of, beside `compute_loss`."""
OWN_STEP = (
    "The model has a {name} of its own, which may minimise another loss than the compiled one. Expected the step that "
    "Keras makes, or loss=. If it minimises what model.compute_loss returns, pass loss=model.compute_loss, otherwise "
    "a function (outputs, targets) -> scalar."
)
NOTHING = (
    "The model is compiled without a loss, and neither its layers (add_loss) nor regularisers add one: there is "
    "nothing to minimise. Expected model.compile(loss=...). Compile it with one, or pass loss=."
)
ADDED_ALONE = (
    "the model is compiled without a loss: what its layers add is measured as the only output, whose position is 1 by "
    "definition"
)
ASSUMED = "loss_terms counts the samples, which is assumed for this loss; pass loss_terms="


@dataclass(frozen=True)
class CompiledLoss:
    """The model's `compute_loss` as a function of the outputs: without what layers and regularisers add.

    Targets are a dictionary with "inputs", "targets" and "sample_weight", and `HELD` where it comes with them.

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
        with unchanged(model), _built(model), replaced(self.variables, targets):
            model._losses_override = [keras.ops.zeros(())]
            return computed(model, opened(outputs), targets)

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that it may read."""
        model: Any = self.model()
        own = list(model.variables) if overrides(model, "compute_loss") else []
        held = held_variables([] if self.compiled is None else [self.compiled()])
        return list({id(variable): variable for variable in (*own, *held)}.values())

    @property
    def separable(self) -> bool:
        """Whether it is a mean over samples."""
        if overrides(self.model(), "compute_loss") or self.identity is None:
            return False
        known = isinstance(self.identity, str) and self.identity.lower() in AUTOMATIC
        return known or KerasLoss(keras.losses.get(self.identity)).separable

    def loss_terms(self, outputs: Any, targets: Any) -> tuple[Any, tuple[str, ...]]:
        """n, and notes on it."""
        if overrides(self.model(), "compute_loss") or self.identity is None:
            return leaves(bare(outputs))[0].shape[0], (ASSUMED,)
        return terms_of(resolved(self.identity, outputs, targets), outputs, targets)

    def sample_terms(self, outputs: Any, targets: Any) -> Any:
        """What each sample weighs in the mean, (N,), or None where all weigh the same, or nobody knows."""
        if overrides(self.model(), "compute_loss") or self.identity is None:
            return None
        return sample_terms_of(resolved(self.identity, outputs, targets), outputs, targets)

    def loss_inputs(self, outputs: Any, targets: Any) -> tuple[str, LossInputs | None]:
        """Its name, and what it is given."""
        model: Any = self.model()
        if overrides(model, "compute_loss"):
            return in_words(model.compute_loss), None
        if self.identity is None:
            return "the model's compiled losses", None
        return inputs_of(resolved(self.identity, outputs, targets), outputs, weighted(targets)[0])


@dataclass(frozen=True)
class WholeLoss:
    """(values of all variables by name, batch) -> the whole loss that `fit` minimises, of shape (1, 1).

    The batch is a dictionary with what `function` takes, and what the loss takes as targets.
    """

    function: Stateless
    loss: CompiledLoss | KerasLoss | OwnLoss | None

    def __call__(self, values: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        def loss(model: Any, outputs: Any) -> Any:
            with as_one_replica():
                value = self._value(model, outputs, batch)
            wide = keras.backend.standardize_dtype(value.dtype) == "float64"
            return keras.ops.reshape(value if wide else keras.ops.cast(value, "float32"), (1, 1))

        return self.function.run(values, batch, loss)

    def _value(self, model: Any, outputs: Any, batch: Mapping[str, Any]) -> Any:
        """The loss, in a scope where the model's variables have their values."""
        if not isinstance(self.loss, CompiledLoss):
            assert self.loss is not None, "nothing is compared where the loss is inferred"
            return self.loss.value(outputs, batch["targets"])
        if model._compile_loss is None and not (overrides(model, "compute_loss") or model.losses):
            raise ValueError(NOTHING)
        with _built(model):
            return computed(model, outputs, batch["targets"])


def only_output(outputs: Any, targets: Any) -> Any:
    """The loss where the model's only output is its loss."""
    return keras.ops.sum(outputs)


def computed(model: Any, outputs: Any, batch: Mapping[str, Any]) -> Any:
    """The value of the model's `compute_loss`, called as `fit` calls it."""
    y, weight = weighted(batch)
    return model._compute_loss(x=batch["inputs"], y=y, y_pred=outputs, sample_weight=weight, training=True)


def compiled_loss(model: Any) -> CompiledLoss:
    """The loss of a compiled model."""
    single = not isinstance(model.loss, dict | list | tuple)
    made = getattr(model, "_compile_loss", None)
    return CompiledLoss(weakref.ref(model), model.loss if single else None, None if made is None else weakref.ref(made))


def is_compute_loss(loss: Any, model: Any) -> bool:
    """Whether the user names the model's own loss."""
    return getattr(loss, "__name__", "") == "compute_loss" and getattr(loss, "__self__", None) is model


def overrides(model: Any, name: str) -> bool:
    """Whether the user's class or the user has replaced a method of Keras's."""
    method = getattr(model, name, None)
    return getattr(method, "__func__", method) is not getattr(keras.Model, name, None)


def own_step(model: Any) -> str:
    """The name of a method with which the user's model makes a step of its own, or ""."""
    return next((name for name in STEP if overrides(model, name)), "")


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
