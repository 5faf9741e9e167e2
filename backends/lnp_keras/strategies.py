"""Several devices: `tf.distribute` around a Keras model on TensorFlow, Keras's own distribution on JAX."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import keras

from lnp.contract.trees import map_leaves
from lnp_keras.model import as_tensors


def as_one_replica() -> contextlib.AbstractContextManager:
    """See `lnp_tensorflow.strategies`."""
    return contextlib.nullcontext() if not _of_tensorflow() else _strategies().as_one_replica()


def outside_of_scope() -> contextlib.AbstractContextManager:
    """See `lnp_tensorflow.strategies`."""
    return contextlib.nullcontext() if not _of_tensorflow() else _strategies().outside_of_scope()


def whole(batches: tuple, model: keras.Layer) -> tuple:
    """See `lnp_tensorflow.strategies`."""
    return batches if not _of_tensorflow() else _strategies().whole(batches, [v.value for v in model.variables])


def placed(batch: Any) -> Any:
    """A batch where Keras's distribution puts those of `fit`: each device holds a part of the samples. Arrays that lie
    with several devices already stay there, and those whose samples cannot be divided evenly where they are.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return batch
    import jax

    def put(leaf: Any) -> Any:
        if not (isinstance(leaf, jax.Array) and leaf.ndim) or isinstance(leaf, jax.core.Tracer):
            return leaf
        layout = distribution.get_data_layout(leaf.shape).backend_layout
        parts = math.prod(layout.mesh.shape[name] for name in jax.tree.leaves(layout.spec[0]))
        return leaf if len(leaf.devices()) > 1 or leaf.shape[0] % parts else jax.device_put(leaf, layout)

    return map_leaves(put, as_tensors(batch))


def needs_all(model: keras.Layer) -> bool:
    """Whether other processes hold parts of the model, and have to measure it too."""
    if keras.backend.backend() != "jax":
        return False
    from lnp_jax.processes import spans

    return any(spans(variable.value) for variable in model.variables)


def _of_tensorflow() -> bool:
    return keras.backend.backend() == "tensorflow"


def _strategies() -> Any:
    from lnp_tensorflow import strategies

    return strategies
