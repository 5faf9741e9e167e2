"""Reader of TensorFlow's checkpoints: the variables that `tf.train.Checkpoint` wrote, into a module that is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from lnp.arguments import Batch
from lnp.checkpoints.files import refuse_claims
from lnp.contract.trees import map_leaves
from lnp.printable import printable

OWN = "_CHECKPOINTABLE_OBJECT_GRAPH"
"""The entry of a checkpoint that describes the others."""


def reader(
    kind: str, *, model: Callable[[], Any] | None, entry: str | None, device: str | None, dtype: str | None
) -> Variables:
    """The reader; a ValueError without the module that it needs, and for what is set in TensorFlow itself."""
    if model is None:
        raise ValueError(
            "TensorFlow's checkpoints hold variables alone, and received no model. Expected a function that makes the "
            "module they belong to. Pass model=, or --model mine.py:build."
        )
    if device or dtype:
        raise ValueError(
            f"Received {'device' if device else 'dtype'}= for TensorFlow's checkpoints. Expected none: set it in the "
            "function that makes the model, such as tf.device(...)."
        )
    return Variables(model, entry)


class Variables:
    """Puts the variables of a checkpoint into a new module."""

    def __init__(self, model: Callable[[], Any], entry: str | None) -> None:
        self._model = model
        self._entry = entry

    def step(self, path: Path, step: int) -> int:
        """The step in the name."""
        return step

    def load(self, path: Path) -> Any:
        """A new module with the checkpoint's variables."""
        return self.fill(path, self._model())

    def fill(self, path: Path, model: Any) -> Any:
        """The module with the variables that the checkpoint holds under one of its names."""
        if not model.trainable_variables:
            raise ValueError(
                f"{printable(path)} cannot be read into a module without variables. Expected a module that has them: "
                "call it once in the function that makes it."
            )
        saved = tf.train.load_checkpoint(str(path))
        shapes, types = saved.get_variable_to_shape_map(), saved.get_variable_to_dtype_map()
        refuse_claims(path, sum(math.prod(shape) * types[name].size for name, shape in shapes.items()))
        names = dict.fromkeys(name.partition("/")[0] for name in sorted(shapes) if name != OWN)
        fitting = [name for name in ["", *names] if self._entry in (None, name) and _fits(path, name, model)]
        if len(fitting) != 1:
            raise ValueError(
                f"{printable(path)} holds the variables of the module under {fitting or 'none'} of its names "
                f"{list(names)}. Expected one. Is it the module that was trained? Choose by entry='...', or --entry."
            )
        _restore(path, fitting[0], model)
        return model

    def prepare(self, batch: Batch) -> Batch:
        """NumPy's arrays as tensors."""
        return map_leaves(lambda leaf: tf.constant(leaf) if isinstance(leaf, np.ndarray) else leaf, batch)

    def size(self, model: Any) -> int:
        """Number of trained parameters."""
        return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)

    def tags(self, path: Path) -> Mapping[str, Any]:
        """Nothing is said about the run."""
        return {}


def _restore(path: Path, name: str, model: Any) -> Any:
    """Read the part of a checkpoint under a name, or of one that was made of the module itself."""
    checkpoint = tf.train.Checkpoint(**{name: model}) if name else tf.train.Checkpoint(model)
    return checkpoint.read(str(path))


def _fits(path: Path, name: str, model: Any) -> bool:
    """Whether every variable of the module is in this part of a checkpoint."""
    try:
        _restore(path, name, model).assert_existing_objects_matched().expect_partial()
    except AssertionError:
        return False
    return True
