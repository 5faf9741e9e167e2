"""Checks that every backend makes on what the user passed: batch, outputs, selection of parameters, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any


def unpack(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch.

    Raises
    ------
    TypeError
        If the batch is not a pair.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    what = f"{type(batch).__name__} of length {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
    if is_loader(batch):
        raise TypeError(
            f"The batch is a {what}, which gives batches. Expected one of them, (inputs, targets). Pass "
            "next(iter(loader)), whose first two items are the inputs and the targets; or batches=, to measure many as "
            "one."
        )
    raise TypeError(
        f"The batch is a {what}. Expected a pair (inputs, targets), where inputs may be an array, a tuple or a dict "
        "(a dict with labels for Hugging Face models). Put the parts together as (inputs, targets)."
    )


def is_loader(batch: Any) -> bool:
    """Whether it gives batches one after the other, and is none itself: no array, table, dictionary or text."""
    several = isinstance(batch, Iterable) and not isinstance(batch, list | tuple | str | bytes | Mapping)
    return several and not hasattr(batch, "shape")


def check_outputs(shapes: Sequence[Sequence[int]]) -> int:
    """The number of samples, from the shapes of the outputs' floating-point leaves.

    Raises
    ------
    ValueError
        For no outputs, outputs without a sample axis, different numbers of samples, and an empty batch.
    """
    if not shapes:
        raise ValueError(
            "The model returned no floating-point outputs. Expected at least one array with the sample axis first. "
            "Pass forward=, a function (model, inputs) -> outputs."
        )
    listed = ", ".join(str(tuple(shape)) for shape in shapes)
    if any(len(shape) == 0 for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"The outputs have shapes {listed}. Expected one sample axis, first in every output and of one length. "
            "Pass forward=, a function (model, inputs) -> outputs that returns the ones to measure."
        )
    if any(0 in shape for shape in shapes):
        raise ValueError(
            f"The batch is empty: the outputs have shapes {listed}. Expected at least one sample and one output."
        )
    return int(shapes[0][0])


def check_lengths(samples: int, targets: Sequence[int] | None) -> None:
    """Raise ValueError unless the targets, given their shape, are as many as the outputs' samples."""
    if targets is not None and (len(targets) == 0 or targets[0] != samples):
        raise ValueError(
            f"The outputs hold {samples} samples, the targets have shape {tuple(targets)}. Expected the same number "
            "along the first axis of both. Check that inputs and targets belong together."
        )


def check_loss(shape: Sequence[int]) -> None:
    """Raise ValueError unless the loss is a scalar."""
    if tuple(shape) not in ((), (1,)):
        raise ValueError(
            f"The loss has shape {tuple(shape)}. Expected a scalar. Average it, for example "
            "loss=lambda outputs, targets: per_sample_loss(outputs, targets).mean()."
        )


def select(names: Iterable[str], parameters: Callable[[str], bool] | str | Iterable[str] | None) -> list[str]:
    """The names that a predicate, a glob or a list picks; all of them for None.

    >>> select(["head.weight", "head.bias", "body.weight"], "head.*")
    ['head.weight', 'head.bias']

    Raises
    ------
    ValueError
        If the model has no trainable parameter, if nothing is picked, and for unknown names in a list.
    """
    names = list(names)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if not names:
        raise ValueError(
            "The model has no trainable parameter, so that nothing can learn. Expected at least one floating-point "
            "parameter that requires a gradient. Unfreeze one, or pass parameters= to choose among frozen ones."
        )
    if parameters is None:
        return names
    if callable(parameters):
        chosen = [name for name in names if parameters(name)]
    elif isinstance(parameters, str):
        chosen = [name for name in names if fnmatchcase(name, parameters)]
    else:
        wanted = list(parameters)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ValueError(
                f"parameters= names {unknown}, which the model does not have. Expected names among: {shown}."
            )
        chosen = [name for name in names if name in wanted]
    if not chosen:
        raise ValueError(f"parameters={parameters!r} picks no parameter. Expected it to match some of: {shown}.")
    return chosen
