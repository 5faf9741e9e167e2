"""The backend's entry points: evaluate and linearize."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from lnp.contract.linearization import Linearization, Subset
from lnp.contract.options import Options
from lnp.contract.trees import leaves, map_leaves
from lnp_torch.complex import real
from lnp_torch.model import Program, accepts
from lnp_torch.on_a_copy import on_a_copy
from lnp_torch.pulls import Vector
from lnp_torch.record import record
from lnp_torch.state_guard import undisturbed

__all__ = ["accepts", "evaluate", "linearize"]


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """Run the computation on the linearised batches; tensors of shape () become floats, in one transfer."""

    def measured(prepared: Program) -> Any:
        if operands.get("update") is not None:
            operands["update"] = _as_vector(prepared, operands["update"])
        records = [record(prepared, batch, options) for batch in batches]
        result = computation(*records, **operands)
        flags = [violation for record in records for violation in record.violations]
        return *to_host(result, [flag for flag, _ in flags]), [message for _, message in flags]

    (result, violated, messages), prepared = on_a_copy(model, options, measured)
    prepared.replica.clear()
    for flag, message in zip(violated, messages, strict=True):
        if flag:
            raise ValueError(message)
    return result


def linearize(model: Any, batch: Any, options: Options) -> Linearization:
    """The record for one batch. It keeps the graph of the forward pass alive, and the copy of the model."""
    made, prepared = on_a_copy(model, options, lambda prepared: record(prepared, batch, options))
    names = [field.name for field in fields(made) if field.name in OPERATORS and getattr(made, field.name) is not None]
    quiet: dict[str, Any] = {name: _quiet(prepared, getattr(made, name)) for name in names}
    return replace(made, **quiet)


OPERATORS = ("vjp", "jvp", "sample_square_norms", "group_square_norms", "subset", "loss_along", "gradient_square_norms")
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


def _as_vector(prepared: Program, update: Any) -> Vector:
    """The user's update as a vector in parameter space, zero for selected parameters that it leaves out."""
    names = list(prepared.parameters)
    given = (
        update
        if isinstance(update, Mapping)
        else dict(zip(names, update, strict=False))
        if len(update) == len(names)
        else {}
    )
    given = {n: real(d) for n, d in given.items()}
    wrong = [n for n, d in given.items() if n not in names or d.shape != prepared.parameters[n].shape]
    if wrong or not given:
        raise ValueError(
            f"update= does not match the model's parameters{f' at {wrong[:4]}' if wrong else ''}. Expected a "
            f"dictionary {{parameter name: tensor of its shape}}, or one tensor for each of the {len(names)} "
            "parameters in their order."
        )
    return [given[n].detach() if n in given else torch.zeros_like(p) for n, p in prepared.parameters.items()]


def to_host(result: Any, flags: list[torch.Tensor]) -> tuple[Any, list[bool]]:
    """Every tensor of shape () as a Python number, in one transfer."""
    single = lambda leaf: isinstance(leaf, torch.Tensor) and not leaf.ndim
    tensors = [leaf for leaf in leaves(result) if single(leaf)] + flags
    if not tensors:
        return result, []
    dtype = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    values = torch.stack([tensor.detach().to(dtype) for tensor in tensors]).tolist()
    numbers = iter([v if t.is_floating_point() else int(v) for v, t in zip(values, tensors, strict=True)])
    result = map_leaves(lambda leaf: next(numbers) if single(leaf) else leaf, result)
    return result, [bool(number) for number in numbers]
