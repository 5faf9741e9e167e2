"""`tf.distribute` around a Keras model on TensorFlow; nothing on other frameworks."""

from __future__ import annotations

import contextlib
from typing import Any

import keras


def as_one_replica() -> contextlib.AbstractContextManager:
    """See `lnp_tensorflow.strategies`."""
    return contextlib.nullcontext() if not _of_tensorflow() else _strategies().as_one_replica()


def outside_of_scope() -> contextlib.AbstractContextManager:
    """See `lnp_tensorflow.strategies`."""
    return contextlib.nullcontext() if not _of_tensorflow() else _strategies().outside_of_scope()


def whole(batches: tuple, model: keras.Layer) -> tuple:
    """See `lnp_tensorflow.strategies`."""
    return batches if not _of_tensorflow() else _strategies().whole(batches, [v.value for v in model.variables])


def _of_tensorflow() -> bool:
    return keras.backend.backend() == "tensorflow"


def _strategies() -> Any:
    from lnp_tensorflow import strategies

    return strategies
