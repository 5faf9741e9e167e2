"""The backend's entry points: evaluate and linearize."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lnp.backends import Options
from lnp.linearization import Linearization
from lnp.structure import leaves, map_leaves
from lnp_torch.complex import real
from lnp_torch.isolation import undisturbed
from lnp_torch.models import Program, accepts, program
from lnp_torch.pulls import Vector
from lnp_torch.record import record

__all__ = ["accepts", "evaluate", "linearize"]


def evaluate(computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
    """Run the computation on the linearised batches; tensors of shape () become floats, in one transfer."""
    prepared = program(model, options.forward, options.parameters)
    with undisturbed(prepared.modules, [prepared.device]):
        if operands.get("update") is not None:
            operands["update"] = _as_vector(prepared, operands["update"])
        records = [record(prepared, batch, options) for batch in batches]
        result = computation(*records, **operands)
        flags = [violation for record in records for violation in record.violations]
        result, violated = to_host(result, [flag for flag, _ in flags])
    for flag, (_, message) in zip(violated, flags, strict=True):
        if flag:
            raise ValueError(message)
    return result


def linearize(model: Any, batch: Any, options: Options) -> Linearization:
    """The record for one batch. It keeps the graph of the forward pass alive."""
    prepared = program(model, options.forward, options.parameters)
    with undisturbed(prepared.modules, [prepared.device]):
        return record(prepared, batch, options)


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
