"""Which objects are part of a model, and so are copied for a measurement; all others are shared with the user."""

from __future__ import annotations

import copy
import functools
import sys
import types
from typing import Any

import torch
from torch import nn

from lnp.contract.trees import map_leaves
from lnp.state.places import Part
from lnp.state.preserve import is_searched_type

HOSTS = frozenset(
    {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "accelerate", "deepspeed", "datasets"}
)
"""Packages whose objects are no part of a model, unless they are modules."""
OF_TORCH = ("torch.nn.", "torch.utils.hooks", "torch.utils.weak")
"""Modules of PyTorch whose objects may be part of a model."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside data-parallel and compiled wrappers, which would hook into the backward pass."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def own_class(kind: type) -> type:
    """The user's own class, of which `fully_shard` has made another one; otherwise the class itself."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    mixed = getattr(fsdp, "FSDPModule", None)
    if mixed is None or mixed not in kind.__bases__:
        return kind
    return kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]


def without_sharding(module: nn.Module) -> list[tuple[dict, dict]]:
    """The hooks of a module that is sharded, and what runs in their place: nothing is gathered or split, and inputs
    and outputs take the types that the `MixedPrecisionPolicy` of `fully_shard` says.
    """
    every: list[tuple[dict, Any]] = [
        (module._forward_pre_hooks, lambda policy: _inputs_as(policy.cast_forward_inputs and policy.param_dtype)),
        (module._forward_hooks, lambda policy: _outputs_as(policy.output_dtype)),
    ]
    made = []
    for hooks, casting in every:
        policies = {key: _policy(hook) for key, hook in hooks.items()}
        kept = {
            key: hook if policies[key] is None else casting(policies[key])
            for key, hook in hooks.items()
            if not _splits(hook)
        }
        if len(kept) < len(hooks) or any(policies.values()):
            made.append((hooks, kept))
    return made


def _splits(hook: Any) -> bool:
    """Whether a hook makes DTensors of a module's inputs, or other ones of its outputs, as tensor parallelism does."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.tensor.")


def _policy(hook: Any) -> Any:
    """The `MixedPrecisionPolicy` of a hook that gathers and shards parameters; None for other hooks."""
    method = hook
    while not hasattr(method, "__self__") and hasattr(method, "__wrapped__"):  # modules that are sharded together
        method = method.__wrapped__
    function = getattr(method, "__func__", method)
    of_fsdp = (getattr(function, "__module__", None) or "").startswith("torch.distributed.fsdp.")
    return method.__self__._mp_policy if of_fsdp else None


def _inputs_as(dtype: torch.dtype | None) -> Any:
    """A forward pre-hook that gives a module its floating-point inputs in a type."""

    def cast_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return map_leaves(lambda x: cast(x, dtype), args), map_leaves(lambda x: cast(x, dtype), kwargs)

    return cast_inputs


def _outputs_as(dtype: torch.dtype | None) -> Any:
    """A forward hook that hands on a module's floating-point outputs in a type."""

    def cast_outputs(module: nn.Module, args: tuple, outputs: Any) -> Any:
        return map_leaves(lambda x: cast(x, dtype), outputs)

    return cast_outputs


def cast(x: Any, dtype: torch.dtype | None) -> Any:
    """A floating-point tensor in a type, with its graph; anything else as it is."""
    return x.to(dtype) if dtype and isinstance(x, torch.Tensor) and x.is_floating_point() else x


def part_of_a_model(kind: type) -> bool:
    if hasattr(kind, "__del__"):  # something that is opened and closed
        return False
    return is_searched_type(kind, HOSTS) or kind.__module__.startswith(OF_TORCH)


def may_differ(content: Any) -> bool:
    """Whether what a closure of a library holds may have a copy."""
    links = (nn.Module, torch.Tensor, types.MethodType, functools.partial)
    return isinstance(content, links) or (
        isinstance(content, types.FunctionType) and (content.__module__ or "").partition(".")[0] != "torch"
    )


def _slots(module: torch.jit.ScriptModule) -> dict[str, torch.Tensor]:
    """{dotted name: tensor} of a scripted or traced module."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _fill_slots(module: torch.jit.ScriptModule, values: list[torch.Tensor]) -> None:
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, value in zip(_slots(module), values, strict=False):  # none, to let go of them
        path, _, own = name.rpartition(".")
        modules[path]._c.setattr(own, value)


SCRIPTED = Part(lambda module: list(_slots(module).values()), _fill_slots)
"""The place of the tensors of a scripted or traced module."""


def copied_iterator(x: Any) -> Any:
    """An iterator at the same place; ValueError for a generator of Python, which nobody can copy."""
    try:
        return copy.copy(x)
    except TypeError as error:
        raise ValueError(
            f"The model or its loss holds a {type(x).__name__}, {x!r}, which a forward pass may advance and nobody can "
            "turn back. Expected state that can be copied: a list with a position, or an object with a __next__ of its "
            "own. Keep it outside of the model, or take it away while lnp measures."
        ) from error


GENERATOR = Part(
    lambda x: [x.get_state()], lambda x, values: x.set_state(values[0]), lambda a, b: a[0].equal(b[0]), refers=False
)
