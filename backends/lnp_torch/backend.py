"""The backend's entry points: evaluate and linearize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from lnp.contract.linearization import Linearization, Subset, Vector
from lnp.contract.options import Options
from lnp.contract.trees import leaves, map_leaves
from lnp.contract.vectors import update_by_name
from lnp_torch.collectives import alone
from lnp_torch.look import CannotRun, Look
from lnp_torch.model import Program, accepts
from lnp_torch.on_a_copy import on_a_copy
from lnp_torch.outputs import real, widened
from lnp_torch.record import record
from lnp_torch.refusals import refuse_devices
from lnp_torch.state_guard import undisturbed
from lnp_torch.tensor_parallel import check_against_model

__all__ = ["accepts", "evaluate", "linearize"]


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """Run the computation on the linearised batches; tensors of shape () become floats, in one transfer.

    Where samples turn out to interact on the way although they were taken apart, that is remembered, and the batches
    are measured again, jointly.
    """
    reasons = [""] * len(batches)
    while True:
        try:
            with alone():
                result, looks = _measurement(computation, model, batches, options, reasons, operands)
        except RuntimeError:
            refuse_devices(model, batches)
            raise
        found = {place: look for place, look in enumerate(looks) if look is not None and look.reason}
        if not found:
            return result
        for place, look in found.items():
            reasons[place] = look.reason
            look.remember()


def _measurement(
    computation: Callable, model: Any, batches: tuple, options: Options, reasons: list[str], operands: dict[str, Any]
) -> tuple[Any, list[Look | None]]:
    """What the computation returns, and what looked at each batch's samples: with a reason, they interact."""
    looks: list[Look | None] = []

    def measured(prepared: Program) -> Any:
        looks.clear()
        given = {name: operand for name, operand in operands.items() if name != "update"}
        if operands.get("update") is not None:
            given["update"] = _update(prepared, operands["update"])
        records = []
        for batch, reason in zip(batches, reasons, strict=True):
            made, look = record(prepared, batch, options, reason)
            records.append(made)
            looks.append(look)
        try:
            result = computation(*records, **given)
            checks = [violation for made in records for violation in made.violations]
            result, violated = decided(result, looks, [flag for flag, _ in checks])
            if (
                hasattr(computation, "together")
                and not any(violated)
                and not any(look and look.reason for look in looks)
            ):
                together: Any = computation
                result = to_host(together.together(*records, result), [])[0]
                if together.group.shares_a_part:
                    check_against_model(together.group, model, batches[0], options, records[0])
            return result, violated, [message for _, message in checks]
        except CannotRun:
            return None, [], []

    (result, violated, messages), prepared = on_a_copy(model, options, measured)
    prepared.replica.clear()
    for flag, message in zip(violated, messages, strict=True):
        if flag:
            raise ValueError(message)
    return result, looks


def linearize(model: Any, batch: Any, options: Options) -> Linearization:
    """The record for one batch. It keeps the graph of the forward pass alive, and the copy of the model."""
    (made, _), prepared = on_a_copy(model, options, lambda prepared: record(prepared, batch, options))
    names = [field.name for field in fields(made) if field.name in OPERATORS and getattr(made, field.name) is not None]
    quiet: dict[str, Any] = {name: _quiet(prepared, getattr(made, name)) for name in names}
    return replace(made, **quiet)


OPERATORS = (
    *("vjp", "jvp", "sample_square_norms", "group_square_norms", "subset", "loss_along"),
    *("gradient_pass", "coupled", "sample_losses"),
)
"""What runs the model's code again."""


def _quiet(prepared: Program, operator: Callable) -> Callable:
    """The operator, leaving no trace each time."""

    def run(*args: Any) -> Any:
        with undisturbed([prepared.device]):
            try:
                found = operator(*args)
            finally:
                prepared.replica.restore()
        if not isinstance(found, Subset):
            return found
        return replace(
            found,
            sample_square_norms=_quiet(prepared, found.sample_square_norms),
            jvp=None if found.jvp is None else _quiet(prepared, found.jvp),
        )

    return run


def _update(prepared: Program, update: Any) -> Vector:
    """The user's update as a vector in parameter space, zero for selected parameters that it leaves out."""
    parameters = prepared.parameters
    expected = (
        f"a dictionary {{parameter name: tensor of its shape}}, or one tensor for each of the {len(parameters)} "
        "parameters in their order"
    )
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    given = update_by_name(map_leaves(_as_real, update), shapes, list, expected)
    return {name: given[name].detach() if name in given else torch.zeros_like(p) for name, p in parameters.items()}


def _as_real(leaf: Any) -> Any:
    return real(leaf) if isinstance(leaf, torch.Tensor) else leaf


def decided(result: Any, looks: list[Look | None], flags: list[torch.Tensor]) -> tuple[Any, list[bool]]:
    """The result and the flags as numbers, with what was looked at decided; all by one transfer."""
    made = [look for look in looks if look is not None]
    for look in made:
        look.coupled()
    values = [value for look in made for value in look.values]
    result, numbers = to_host(result, [*flags, *values])
    rest = iter(numbers[len(flags) :])
    for look in made:
        look.decide([float(next(rest)) for _ in look.values])
    return result, [bool(number) for number in numbers[: len(flags)]]


LARGE = 2**16
"""Numbers from which on an array goes to the host by itself, in its own type: a gradient, for whom one transfer is as
good as another, and which would be held twice more on its way.
"""


def to_host(result: Any, others: list[torch.Tensor]) -> tuple[Any, list[float]]:
    """Every tensor of shape () as a Python number, others as NumPy arrays, and `others` as numbers: all small ones in
    one transfer.
    """
    tensors = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)] + others
    small = [tensor for tensor in tensors if tensor.numel() < LARGE]
    found: list[np.ndarray] = []
    if small:
        device = small[0].device  # a loss of the user's may have brought its targets there itself
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = torch.cat([tensor.detach().to(device, dtype).reshape(-1) for tensor in small]).cpu().numpy()
        found = np.split(values, np.cumsum([tensor.numel() for tensor in small])[:-1])
    pieces = iter(found)
    brought = iter(
        [_on_host(next(pieces), t) if t.numel() < LARGE else widened(t.detach()).cpu().numpy() for t in tensors]
    )
    result = map_leaves(lambda leaf: next(brought) if isinstance(leaf, torch.Tensor) else leaf, result)
    return result, list(brought)


def _on_host(values: np.ndarray, like: torch.Tensor) -> Any:
    """A tensor's values as a number or an array of its shape."""
    if like.ndim:
        return values.reshape(like.shape)
    return float(values[0]) if like.is_floating_point() else int(values[0])
