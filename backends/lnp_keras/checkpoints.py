"""Reader of Keras's files, .keras and .h5: the weights alone, into a model that is given.

The configuration in a .keras file is never read. It says which objects to make, and has been a way to run code with
Keras's safe mode on (CVE-2025-1550, CVE-2025-9906, CVE-2026-1462).
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py

from lnp.arguments import Batch
from lnp.checkpoints.files import refuse_claims
from lnp.printable import printable
from lnp_keras.callback import trained

INSIDE = "model.weights.h5"
"""The weights in a .keras file, which is an archive."""


def reader(
    kind: str, *, model: Callable[[], Any] | None, entry: str | None, device: str | None, dtype: str | None
) -> KerasWeights:
    """The reader; a ValueError without the model that it needs, and for what is set in Keras itself."""
    if model is None:
        raise ValueError(
            "Of Keras's checkpoints the weights are read, and received no model. Expected a function that makes the "
            "model they belong to: a configuration in a file can run code. Pass model=, or --model mine.py:build."
        )
    if device or dtype or entry:
        raise ValueError(
            f"Received {'device' if device else 'dtype' if dtype else 'entry'}= for Keras's checkpoints. Expected "
            "none: set it in the function that makes the model, such as keras.config.set_floatx(...)."
        )
    return KerasWeights(model)


class KerasWeights:
    """Puts the weights of a file into a new model."""

    def __init__(self, model: Callable[[], Any]) -> None:
        self._model = model

    def step(self, path: Path, step: int) -> int:
        """The step in the name."""
        return step

    def load(self, path: Path) -> Any:
        """A new model with these weights."""
        return self.fill(path, self._model())

    def fill(self, path: Path, model: Any) -> Any:
        """The model with these weights; Keras raises an error for some that do not fit."""
        if not model.weights:
            raise ValueError(
                f"{printable(path)} cannot be read into a model without weights. Expected a model that is built: give "
                "it a keras.Input, or call it once in the function that makes it."
            )
        refuse_claims(path, _claimed(path))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")  # it is not asked for
            model.load_weights(path)
        return model

    def prepare(self, batch: Batch) -> Batch:
        """NumPy's arrays, as Keras takes them."""
        return batch

    def size(self, model: Any) -> int:
        """Number of trained parameters."""
        return trained(model)

    def tags(self, path: Path) -> Mapping[str, Any]:
        """Nothing is said about the run."""
        return {}


def _claimed(path: Path) -> int:
    """Bytes that the arrays of a file take, by what it says of them. A ValueError for what leads out of the file, which
    older releases of Keras follow.
    """
    if path.suffix != ".keras":
        with h5py.File(path) as file:
            return _bytes_in(file)
    with zipfile.ZipFile(path) as archive:
        refuse_claims(path, archive.getinfo(INSIDE).file_size)
        with archive.open(INSIDE) as opened, h5py.File(opened) as file:
            return _bytes_in(file)


def _bytes_in(group: h5py.Group) -> int:
    """The sum over all arrays below a group. What is there under two names counts once, so that circles end."""
    total, seen, groups = 0, set(), [group]
    while groups:
        group = groups.pop()
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"its entry {printable(group.name)}/{printable(name)} is a link")
            entry = group[name]
            info = h5py.h5o.get_info(entry.id)
            if (info.fileno, info.addr) in seen:
                continue
            seen.add((info.fileno, info.addr))
            if isinstance(entry, h5py.Group):
                groups.append(entry)
            elif isinstance(entry, h5py.Dataset):
                if entry.external or entry.is_virtual:
                    raise ValueError(f"its array {printable(entry.name)} lies in another file")
                total += math.prod(entry.shape or ()) * entry.dtype.itemsize
    return total
