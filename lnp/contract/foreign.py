"""What is said where the user's own model or loss raises an error: data that is none of the framework's, or what the
model was called with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

TABLES = ("pandas", "polars", "pyarrow")
TEXTS = (str, bytes)
NOT_INFERRED = "The loss cannot be inferred"
"""Begins those of lnp's own errors that targets of other kinds raise (`lnp.losses.kinds`)."""


def is_own(error: BaseException) -> bool:
    """Whether an error was raised by lnp's own code, whose message says what to do."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    root = "" if place is None else str(place.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return root == "lnp" or root.startswith("lnp_")


def tell_inputs(batches: tuple, error: Exception) -> None:
    """Add a note to an error of the user's own code: which inputs the model was called with, and in which order."""
    if is_own(error) or not batches or not (isinstance(batches[0], list | tuple) and len(batches[0]) >= 2):
        return
    inputs, targets = batches[0][:2]
    text = (
        f"lnp had called the model with inputs {_described(inputs)}, for targets {_described(targets)}. A batch is "
        "(inputs, targets), and a loss of your own is called as loss(outputs, targets)."
    )
    if all(isinstance(part, list | tuple) and len(part) == 2 for part in batches[0]):
        text += f" If these are {len(batches[0])} batches, pass batches={len(batches[0])}."
    if text not in getattr(error, "__notes__", ()):
        error.add_note(text)


def why_foreign(batches: tuple, backend: Any, error: BaseException) -> str | None:
    """What a batch holds that is no array of the model's framework, which is probably why measuring failed; or None.

    Asked only after a failure: a model may well take lists or texts, and then nothing is wrong with them. A backend
    whose framework does not compute with NumPy's arrays says by `CONVERSION` how users convert them.

    >>> print(why_foreign((([[1.0], [2.0]], np.ones(2)),), None, TypeError("no floats here")))
    The inputs are nested lists of 2 rows, and measuring them failed: no floats here. Expected arrays of numbers. \
Convert them, for example by numpy.asarray(values).
    """
    if is_own(error) and NOT_INFERRED not in str(error):
        return None  # it says something else that is wrong
    conversion = getattr(backend, "CONVERSION", None)
    for batch in batches:
        if not (isinstance(batch, list | tuple) and len(batch) >= 2):
            continue
        for part, values in (("inputs", batch[0]), ("targets", batch[1])):
            what = _foreign(values, numpy_too=conversion is not None)
            if what:
                failed = "." if is_own(error) else f", and measuring them failed: {_first_line(error)}"
                wanted = "arrays of numbers" + (", the framework's own" if conversion else "")
                return (
                    f"The {part} are {what}{failed} Expected {wanted}. Convert them, for example by "
                    f"{conversion or 'numpy.asarray(values)'}."
                )
    return None


def _foreign(values: Any, numpy_too: bool) -> str | None:
    """What is no array among the values, in words; None where there is nothing of the kind."""
    if isinstance(values, Mapping):
        return next((found for part in values.values() if (found := _foreign(part, numpy_too))), None)
    if type(values).__module__.partition(".")[0] in TABLES:
        return f"a {type(values).__module__.partition('.')[0]}.{type(values).__name__}"
    if isinstance(values, np.ndarray) and (numpy_too or values.dtype.kind in "OSU"):
        return f"a numpy.ndarray of shape {values.shape} and dtype {values.dtype}"
    if isinstance(values, TEXTS):
        return f"a {type(values).__name__}"
    if isinstance(values, list | tuple) and values:
        if isinstance(values, list) and all(isinstance(value, int | float) for value in values):
            return f"a list of {len(values)} numbers"
        if isinstance(values, list) and all(isinstance(value, TEXTS) for value in values):
            return f"a list of {len(values)} texts"
        if isinstance(values, list) and all(isinstance(v, list) and _foreign(v, numpy_too) for v in values):
            return f"nested lists of {len(values)} rows"
        return next((found for part in values if (found := _foreign(part, numpy_too))), None)
    return None


def _described(values: Any) -> str:
    """Type, shape and dtype of values, one after the other for several."""
    if isinstance(values, Mapping):
        return "{" + ", ".join(f"{name}: {_described(value)}" for name, value in list(values.items())[:6]) + "}"
    if isinstance(values, list | tuple):
        return "(" + ", ".join(_described(value) for value in values[:6]) + ")"
    shape, dtype = getattr(values, "shape", None), getattr(values, "dtype", None)
    return type(values).__name__ if shape is None else f"{type(values).__name__} {tuple(shape)} of {dtype}"


def _first_line(error: BaseException) -> str:
    """The beginning of an error's message, as a sentence."""
    line = (str(error).strip().splitlines() or ["without a message"])[0]
    return f"{line[:160].rstrip('. ')}."
