"""Which objects are part of a model, and so are copied for a measurement; all others are shared with the user."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn

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
