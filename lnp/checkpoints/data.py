"""Batches from files: texts, tokens, arrays, or what a Python file of the user's makes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lnp.arguments import Batch
from lnp.printable import printable
from lnp.tracking.batch_source import is_batch


def text_tokens(path: Path, tokenizer: Any) -> np.ndarray:
    """The tokens of a text file, (tokens,)."""
    text = path.read_text(encoding="utf-8")
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def read_tokens(path: Path) -> np.ndarray:
    """The integers in an .npy file: (tokens,), or (sequences, tokens)."""
    tokens = _load(path)
    if not isinstance(tokens, np.ndarray) or tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
        found = f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else "several arrays"
        raise ValueError(
            f"{printable(path)} holds {found}. Expected integers, (tokens,) or (sequences, tokens), as numpy.save "
            "writes them."
        )
    return tokens


def sequences(tokens: np.ndarray, length: int, size: int, count: int) -> list[np.ndarray]:
    """`count` arrays of shape (size, length), spread evenly over the tokens; sequences do not overlap.

    >>> [part.tolist() for part in sequences(np.arange(9), 2, 1, 2)]
    [[[0, 1]], [[6, 7]]]

    Raises
    ------
    ValueError
        If there are too few.
    """
    rows = tokens if tokens.ndim == 2 else tokens[: len(tokens) // length * length].reshape(-1, length)
    return [np.asarray(rows[chosen], dtype=np.int64) for chosen in _spread(len(rows), size, count, "sequences")]


def array_batches(path: Path, size: int, count: int) -> list[Batch]:
    """Batches from the arrays of an .npz file: `inputs` and `targets`, or the items of a dictionary with `labels`."""
    arrays = _load(path)
    names = set() if isinstance(arrays, np.ndarray) else set(arrays)
    pair = names == {"inputs", "targets"}
    if not pair and "labels" not in names:
        raise ValueError(
            f"{printable(path)} holds {sorted(names) or 'one array'}. Expected numpy.savez(file, inputs=..., "
            "targets=...), or arrays under the names that the model takes, with labels."
        )
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{printable(path)} holds arrays of lengths {lengths}. Expected one row for each sample.")
    found = []
    for chosen in _spread(next(iter(lengths.values())), size, count, "samples"):
        batch = {name: array[chosen] for name, array in arrays.items()}
        found.append((batch["inputs"], batch["targets"]) if pair else batch)
    return found


def python_batches(source: str) -> list[Batch]:
    """The batches that a name in a Python file stands for: one, several, or a function that returns or yields them."""
    made = from_file(source)
    made = made() if callable(made) else made
    return [made] if is_batch(made) else list(made)


def from_file(source: str) -> Any:
    """What a name in a Python file stands for, "mine.py:name". The file is run."""
    at, _, name = source.rpartition(":")
    if not at or not Path(at).is_file():
        raise ValueError(f"Received {source!r}. Expected a Python file and a name in it, such as mine.py:batches.")
    path = Path(at).resolve()
    spec: Any = importlib.util.spec_from_file_location(f"lnp_file_{path.stem}", path)
    if spec is None:
        raise ValueError(f"{printable(path)} is no Python file. Expected one, such as mine.py.")
    module = sys.modules.get(spec.name)
    if module is None or getattr(module, "__file__", None) != str(path):
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.insert(0, str(path.parent))  # as for a script: it may import its neighbours
        spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"{printable(path)} has no {name!r}. Expected a name that the file defines.")
    return getattr(module, name)


def function_from_file(source: str | None) -> Callable[..., Any] | None:
    """A function in a Python file; None for none."""
    if source is None:
        return None
    made = from_file(source)
    if not callable(made):
        raise ValueError(f"{source!r} is of type {type(made).__name__}. Expected a function that makes the model.")
    return made


def _spread(available: int, size: int, count: int, what: str) -> list[np.ndarray]:
    """The rows of each batch, spread evenly over those that there are."""
    if available < size * count:
        raise ValueError(
            f"The data hold {available} {what}. Expected {size * count}, for {count} batches of {size}. Choose smaller "
            "ones (--batch-size, --count, --length), or give more data."
        )
    rows = np.linspace(0, available - 1, size * count).round().astype(np.int64)
    return [rows[index::count] for index in range(count)]


def _load(path: Path) -> Any:
    """An array, or {name: array}; never a pickle."""
    try:
        found = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
        return found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (ValueError, EOFError) as error:
        raise ValueError(f"{printable(path)} holds no arrays of numbers ({error}). Expected .npy or .npz.") from error
