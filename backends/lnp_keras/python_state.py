"""What layers read from Python when they are traced: compiled code holds it as constants, and must not outlive it."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras

from lnp.contract.trees import leaves
from lnp.state.fingerprint import fingerprint
from lnp.state.places import global_names
from lnp_keras.state_guard import FOREIGN, VARIABLE

PLAIN = (bool, int, float, str, type(None))


def plain_state(layers: Iterable[keras.Layer]) -> tuple:
    """What is reached from the attributes of the layers: constants in compiled code, and nothing where none is.

    Plain values, arrays, what functions have closed over, the user's own classes and the globals that they name;
    tensors by identity. Of Keras's own attributes only those that are public and that no step writes to.
    """
    if keras.backend.backend() == "torch":
        return ()
    plain: list[Any] = []
    roots: list[Any] = []
    for layer in layers:
        plain.append(layer.trainable)
        roots.append(type(layer))  # of the user's classes what they share, and the globals that they name
        for name, value in _attributes(layer):
            if isinstance(value, PLAIN):
                plain.append((name, type(value), repr(value) if isinstance(value, float) else value))
            elif not isinstance(value, (keras.Layer, VARIABLE)):
                roots.append(_unwrapped(value))
                plain.append((name, tuple(Same(leaf) for leaf in leaves(roots[-1]) if keras.ops.is_tensor(leaf))))
    return (*plain, fingerprint(roots, FOREIGN | {"keras"}, lambda inner: type(inner).__qualname__))


@dataclass(frozen=True, eq=False)
class Same:
    """A tensor as a key: equal to itself alone."""

    tensor: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


def _attributes(layer: keras.Layer) -> Iterator[tuple[str, Any]]:
    """The layer's own attributes: public ones, and those that the user's code names."""
    kind: Any = type(layer)
    kept, named = _keras_names(), _names_in_code(kind)
    for name, value in vars(layer).items():
        if name not in kept and (name[0] != "_" or name in named):
            yield name, value


@functools.cache
def _keras_names() -> frozenset[str]:
    """The attributes that Keras keeps on each layer and model for its own use."""
    return frozenset({*vars(keras.layers.Layer()), *vars(keras.Model())}) - {"supports_masking", "input_spec"}


@functools.cache
def _names_in_code(kind: type) -> frozenset[str]:
    """The names that the methods of the user's own classes use."""
    own = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in ("keras", "builtins", *FOREIGN)]
    functions = [f for base in own for f in vars(base).values() if isinstance(f, types.FunctionType)]
    return frozenset(name for function in functions for name in global_names(function))


def _unwrapped(value: Any) -> Any:
    return getattr(value, "_storage", getattr(value, "__wrapped__", value))  # TensorFlow's wrappers of containers
