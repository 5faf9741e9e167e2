"""A Keras model as a pure function of its variables, which every framework's backend takes."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras.src.backend import get_keras_mask  # there is no public way to read a mask

from lnp.contract.trees import leaves, map_leaves
from lnp.contract.validation import select
from lnp_keras.python_state import plain_state
from lnp_keras.state_guard import Scope, unchanged

CHANGED_FLAGS = (
    "trainable flags have changed after fit compiled its step, which goes on training what it did, and so is measured "
    "here: compile the model again where this is not meant"
)
WRAPPERS = ("TorchModuleWrapper", "TFSMLayer")
"""Layers that hold another framework's module."""


@dataclass(frozen=True)
class Stateless:
    """(values of all variables by name, {"inputs", "statistics"}) -> outputs. Nothing is written to the model.

    Equal functions share compiled code. The model is held by a weak reference, so that compiled code does not keep it
    alive.

    Attributes
    ----------
    model:
        Weak reference to the model or layer.
    forward:
        The user's (model, inputs) -> outputs, or None for what `fit` calls.
    frozen:
        Positions among the model's layers of the normalisations that use the statistics that come with the inputs.
    state:
        What the attributes of the layers hold: constants in compiled code.
    masks:
        Whether outputs come with the masks that Keras's losses read from them.
    """

    model: weakref.ref
    forward: Callable | None = None
    frozen: tuple[int, ...] = ()
    state: tuple = ()
    masks: bool = True

    def __call__(self, values: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        return self.run(values, batch, _with_masks if self.masks else _alone)

    def run(self, values: Mapping[str, Any], batch: Mapping[str, Any], then: Callable[[Any, Any], Any]) -> Any:
        """then(model, outputs), while the model's variables have these values."""
        model: Any = self.model()
        known = named_variables(model)
        mapping = [(known[name], value) for name, value in values.items()]
        layers = [flat_layers(model)[position] for position in self.frozen]
        for layer, (mean, variance) in zip(layers, batch["statistics"], strict=True):
            mapping += [(layer.moving_mean, mean[0]), (layer.moving_variance, variance[0])]
        scope = Scope(mapping, model.trainable_variables)
        with unchanged(self.model, self.forward), inference_mode(layers), scope:
            result = then(model, (self.forward or called)(model, batch["inputs"]))
        _observe(self, model, Observed(bool(scope.losses), scope.overwritten))
        return result


def _alone(model: keras.Layer, outputs: Any) -> Any:
    return outputs


def _with_masks(model: keras.Layer, outputs: Any) -> Any:
    """The outputs, and the masks that came with them: on JAX part of Keras's own state, which is put back later."""
    masks = [get_keras_mask(leaf) for leaf in leaves(outputs)]
    return outputs if all(mask is None for mask in masks) else {"outputs": outputs, "masks": masks}


@dataclass(frozen=True)
class Observed:
    """What a pass of a model did beside computing: add terms to the loss, write to variables that are trained."""

    adds_terms: bool = False
    overwrites: bool = False


_OBSERVED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
"""{model: {function of it: what its passes did}}."""
_KEPT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
"""{model: {function of it: the first one that was equal to it}}."""
REMEMBERED = 256


def _observe(function: Stateless, model: keras.Layer, seen: Observed) -> None:
    found = _OBSERVED.setdefault(model, OrderedDict())
    before = found.pop(function, Observed())
    found[function] = Observed(before.adds_terms or seen.adds_terms, before.overwrites or seen.overwrites)
    while len(found) > REMEMBERED:
        found.popitem(last=False)


def kept(function: Stateless) -> Stateless:
    """The first function that was equal to this one: what is remembered of it lives as long as the model."""
    found = _KEPT.setdefault(function.model(), OrderedDict())
    first = found.setdefault(function, function)
    found.move_to_end(function)
    while len(found) > REMEMBERED:
        found.popitem(last=False)
    return first


def observed(function: Stateless) -> Observed:
    """In its passes so far; code that is compiled already was observed when it was traced."""
    return _OBSERVED.get(function.model(), {}).get(function, Observed())


@dataclass(frozen=True)
class Snapshot:
    """A model with other values of all its variables: those from before an update, with moving statistics and seeds."""

    model: keras.Layer
    values: dict[str, Any]


def accepts(model: Any) -> bool:
    """Whether the model is a Keras 3 model or layer, or was one before an update."""
    return isinstance(model, keras.Layer | Snapshot)


def stateless(model: keras.Layer, forward: Callable | None) -> Stateless:
    """The model as a function.

    Raises
    ------
    ValueError
        For a model without variables yet, on a Keras backend that cannot differentiate, or with layers whose variables
        Keras does not replace.
    """
    if keras.backend.backend() not in ("tensorflow", "jax", "torch"):
        raise ValueError(
            f"Keras runs on {keras.backend.backend()!r}, which cannot differentiate. Expected TensorFlow, JAX or "
            "PyTorch. Set the environment variable KERAS_BACKEND to one of them before Keras is imported."
        )
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built: it has no variables yet. Expected a model that knows the shape of "
            "its inputs. Call it once on a batch, or model.build(shape)."
        )
    foreign = [layer.name for layer in flat_layers(model) if type(layer).__name__ in WRAPPERS]
    if foreign:
        raise ValueError(
            f"The layers {foreign} hold another framework's module, whose variables Keras cannot replace. Expected "
            "Keras layers. Pass the framework's own module to lnp instead."
        )
    return Stateless(weakref.ref(model), forward, state=plain_state(flat_layers(model)))


def called(model: keras.Layer, inputs: Any) -> Any:
    """What `fit` calls: in training mode, if the model has one."""
    if "training" in inspect.signature(model.call).parameters:
        return model(inputs, training=True)
    return model(inputs)


def named_variables(model: keras.Layer) -> dict[str, Any]:
    """{dotted path: variable} of all variables, without the model's own name in front.

    Where layers have the same path, the later ones have underscores behind it, so that no two share a name.
    """
    owners = {id(v): id(layer) for layer in flat_layers(model) for v in _own_variables(layer)}
    taken: dict[str, int] = {}
    found: dict[str, Any] = {}
    for variable in model.variables:
        path = variable.path.replace("/", ".").removeprefix(f"{model.name}.")
        layer, dot, name = path.rpartition(".")
        owner = owners.get(id(variable), id(variable))
        while dot and taken.setdefault(layer, owner) != owner:
            layer += "_"
        path = f"{layer}{dot}{name}"
        while path in found:
            path += "_"
        found[path] = variable
    return found


def _own_variables(layer: keras.Layer) -> list[Any]:
    """Those of the layer itself, without those of layers in it."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def selected(model: keras.Layer, parameters: Any) -> list[str]:
    """The names of the variables that are trained, or of those that the user picks: also of frozen layers, but nothing
    that is no parameter, such as statistics, seeds and counters.
    """
    trained = {id(variable) for variable in fitted(model)[0]}
    own = {id(v) for layer in flat_layers(model) for v in layer._trainable_variables}
    names = [
        name
        for name, variable in named_variables(model).items()
        if id(variable) in trained or (parameters is not None and id(variable) in own)
    ]
    integers = [name for name in names if "int" in keras.backend.standardize_dtype(named_variables(model)[name].dtype)]
    return select([name for name in names if name not in integers], parameters)


def fitted(model: keras.Layer) -> tuple[list[keras.Variable], tuple[str, ...]]:
    """The variables that `fit` updates, and notes.

    On TensorFlow a step that is compiled already goes on with those that were trainable then, which are those that the
    optimizer was built for.
    """
    variables = list(model.trainable_variables)
    optimizer: Any = getattr(model, "optimizer", None)
    compiled = keras.backend.backend() == "tensorflow" and getattr(model, "train_function", None) is not None
    if not compiled or getattr(model, "run_eagerly", False) or not getattr(optimizer, "built", False):
        return variables, ()
    own = {id(variable) for variable in model.variables}
    held = [variable for variable in optimizer._trainable_variables if id(variable) in own]
    if {id(variable) for variable in held} == {id(variable) for variable in variables}:
        return variables, ()
    return held, (CHANGED_FLAGS,)


def flat_layers(model: keras.Layer) -> list[keras.Layer]:
    """The model and all layers in it, in a fixed order."""
    return list(model._flatten_layers())


def computes_narrowly(model: keras.Layer) -> bool:
    """Whether some of it is computed in less than float32."""
    kinds = {keras.backend.standardize_dtype(layer.compute_dtype or "float32") for layer in flat_layers(model)}
    return bool(kinds & {"float16", "bfloat16"})


@contextlib.contextmanager
def inference_mode(layers: list[keras.Layer]) -> Iterator[None]:
    """These layers use their moving statistics although the model is called in training mode."""
    before = [layer._trainable for layer in layers]
    try:
        for layer in layers:
            layer._trainable = False  # not the property, which would change the variables too
        yield
    finally:
        for layer, trainable in zip(layers, before, strict=True):
            layer._trainable = trainable


def as_tensors(tree: Any) -> Any:
    """Arrays as tensors of the framework."""

    def tensor(leaf: Any) -> Any:
        if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
            return leaf
        # a NumPy scalar would be rounded to Keras's default type
        return keras.ops.convert_to_tensor(np.asarray(leaf) if isinstance(leaf, np.generic) else leaf)

    return map_leaves(tensor, tree)


def unpack(batch: Any) -> tuple[Any, Any, Any]:
    """(inputs, targets, sample weights or None)."""
    if isinstance(batch, list | tuple) and len(batch) in (2, 3):
        return (*batch, None) if len(batch) == 2 else tuple(batch)
    what = f"{type(batch).__name__} of length {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
    raise TypeError(
        f"The batch is a {what}. Expected (inputs, targets) or (inputs, targets, sample_weight), as `fit` takes them. "
        "Put the parts together in a tuple."
    )
