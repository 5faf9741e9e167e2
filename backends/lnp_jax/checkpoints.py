"""Reader of Orbax's checkpoints: a tree of arrays, of which a function that is given makes a model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp.arguments import Batch
from lnp.checkpoints.files import refuse_claims
from lnp.contract.trees import map_leaves
from lnp.optional import import_optional
from lnp.printable import printable

TREE = "_METADATA"
"""The file that a folder with a tree of arrays has."""


def reader(
    kind: str, *, model: Callable[[Any], Any] | None, entry: str | None, device: str | None, dtype: str | None
) -> OrbaxTrees:
    """The reader; a ValueError without the function that makes models."""
    if model is None:
        raise ValueError(
            "Orbax's checkpoints hold arrays alone, and received no model. Expected a function model(tree) -> model, "
            "such as lambda tree: (apply, tree['params']). Pass model=, or --model mine.py:build."
        )
    return OrbaxTrees(model, entry, device, dtype)


class OrbaxTrees:
    """Makes a model of each checkpoint's tree."""

    def __init__(self, model: Callable[[Any], Any], entry: str | None, device: str | None, dtype: str | None) -> None:
        self._orbax = import_optional("orbax.checkpoint", "Measuring Orbax's checkpoints", install="orbax-checkpoint")
        self._model = model
        self._entry = entry
        self._device = None if device is None else jax.devices(device)[0]
        self._dtype = dtype

    def quiet(self) -> None:
        """Keep Orbax from telling of every checkpoint which files it does not have, in this process."""
        logging.getLogger("absl").setLevel(logging.ERROR)

    def step(self, path: Path, step: int) -> int:
        """The step in the name."""
        return step

    def load(self, path: Path) -> Any:
        """What the given function makes of the tree."""
        checkpointer = self._orbax.PyTreeCheckpointer()
        at = self._tree(path).resolve()
        found = checkpointer.metadata(at)
        found = getattr(found, "item_metadata", found)
        shapes = getattr(found, "tree", found)
        refuse_claims(path, sum(map(_claimed, jax.tree.leaves(shapes))))
        # as NumPy's arrays: the devices of the run that wrote them may not be there
        as_numpy = self._orbax.RestoreArgs(restore_type=np.ndarray)
        tree = checkpointer.restore(at, restore_args=jax.tree.map(lambda _: as_numpy, shapes))
        return self._model(jax.tree.map(self._array, tree))

    def prepare(self, batch: Batch) -> Batch:
        """NumPy's arrays as JAX's, on the model's device."""
        return map_leaves(lambda leaf: self._array(leaf) if isinstance(leaf, np.ndarray) else leaf, batch)

    def size(self, model: Any) -> int:
        """Number of parameters that are floats; of Flax NNX modules, in their state."""
        leaves = [leaf for leaf in jax.tree.leaves(model) if hasattr(leaf, "dtype")]
        return sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact))

    def tags(self, path: Path) -> Mapping[str, Any]:
        """Nothing is said about the run."""
        return {}

    def _tree(self, path: Path) -> Path:
        """The folder with the tree, in a checkpoint that may hold several items."""
        found = [at for at in (path, *sorted(path.iterdir())) if (at / TREE).is_file()]
        chosen = [at for at in found if self._entry in (None, at.name)]
        if len(chosen) != 1:
            raise ValueError(
                f"{printable(path)} holds {[at.name for at in found] or 'no'} trees of arrays. Expected one. Choose: "
                "entry='...', or --entry."
            )
        return chosen[0]

    def _array(self, leaf: Any) -> Any:
        """An array on the device, floats in the given type."""
        array = jnp.asarray(leaf)
        if self._dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(self._dtype)
        return array if self._device is None else jax.device_put(array, self._device)


def _claimed(leaf: Any) -> int:
    """Bytes that an array of a tree takes, by what the checkpoint says of it; 0 for what is none."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return 0 if shape is None or dtype is None else math.prod(shape) * np.dtype(dtype).itemsize
